//! What is held and sent, against the models themselves, and what sharding and cutting change.

use tandem_engine::{Model, Precision, WeightFormat};

use super::share::Units;
use super::*;
use crate::config::{LoraConfig, NewModelConfig, Origin};

fn config(text: &str) -> Config {
    Config::parse(text, &Origin::Defaults, &[]).unwrap()
}

fn spec() -> ModelSpec {
    let shape =
        NewModelConfig { hidden: 32, layers: 3, heads: 4, kv_heads: Some(2), mlp_width: 48, ..Default::default() };
    shape.spec(120)
}

fn mesh(data: usize, tensor: usize, pipeline: usize) -> Mesh {
    Mesh { data, tensor, pipeline }
}

fn footprint(text: &str, stage: Stage, mesh: Mesh) -> Footprint {
    Footprint::new(&config(text), stage, &spec(), mesh, 1)
}

fn held(footprint: &Footprint, what: &str) -> u64 {
    let part = footprint.held().iter().find(|part| part.what.starts_with(what));
    part.unwrap_or_else(|| panic!("{what} is not in {footprint}")).bytes
}

fn parameters() -> u64 {
    Model::initial(spec(), Head::Language, 0).unwrap().parameters() as u64
}

#[test]
fn one_rank_holds_four_times_its_weights_and_sends_nothing() {
    let alone = footprint("", Stage::Sft, mesh(1, 1, 1));
    let weights = 4 * parameters();
    assert_eq!(held(&alone, "actor: weights"), weights);
    assert_eq!(held(&alone, "actor: gradients"), weights);
    assert_eq!(held(&alone, "actor: optimizer moments"), 2 * weights);
    assert_eq!(alone.sent(), []);
    // Stages of sharding mean nothing to one rank.
    let sharded = footprint("actor.zero_stage = 3", Stage::Sft, mesh(1, 1, 1));
    assert_eq!(sharded.memory_bytes(), alone.memory_bytes());
    assert!(footprint("sft.recompute = true", Stage::Sft, mesh(1, 1, 1)).memory_bytes() < alone.memory_bytes());
}

#[test]
fn each_stage_of_sharding_takes_one_more_thing_apart() {
    let on = |stage: u8| footprint(&format!("actor.zero_stage = {stage}"), Stage::Sft, mesh(4, 1, 1));
    let stages = [0, 1, 2, 3].map(on);
    // All units of this model are multiples of four.
    let (whole, quarter) = (4 * parameters(), parameters());
    for (what, wanted) in [
        ("actor: weights", [whole, whole, whole, quarter]),
        ("actor: gradients", [whole, whole, quarter, quarter]),
        ("actor: optimizer moments", [2 * whole, 2 * quarter, 2 * quarter, 2 * quarter]),
    ] {
        assert_eq!(stages.each_ref().map(|stage| held(stage, what)), wanted, "{what}");
    }
    let block = Units::of(&spec(), Head::Language, 1, 1).largest();
    assert_eq!(held(&stages[3], "actor: units gathered"), 2 * 4 * block);
    assert_eq!(held(&stages[2], "actor: gradients under way"), 2 * 4 * block);
    // 32 rows of 512 tokens in four lanes: eight rows are one forward of 4096 tokens.
    let slices = 3 * quarter;
    assert_eq!(stages.each_ref().map(Footprint::sent_bytes), [2 * slices, 2 * slices, 2 * slices, 3 * slices]);
    let twice = "sft.tokens_per_micro_batch = 2048\nactor.zero_stage = ";
    let sent = |stage: u8| footprint(&format!("{twice}{stage}"), Stage::Sft, mesh(4, 1, 1)).sent_bytes();
    assert_eq!([0, 1, 2, 3].map(sent), [2 * slices, 2 * slices, 3 * slices, 6 * slices]);
}

#[test]
fn small_units_and_files_are_set_apart() {
    let block = Units::of(&spec(), Head::Language, 1, 1).block;
    let text = format!("actor.zero_stage = 3\nparallel.persistence_threshold = {}", block - 1);
    let some = footprint(&text, Stage::Sft, mesh(4, 1, 1));
    let ends = Units::of(&spec(), Head::Language, 1, 1).ends;
    assert!(ends < block);
    assert_eq!(held(&some, "actor: weights"), 4 * ends + 3 * block);
    assert_eq!(some.sent_bytes(), 3 * (9 * block + 2 * ends), "the ends are gathered once, after the step");

    let files = footprint("actor = { zero_stage = 1, offload = 'optimizer' }", Stage::Sft, mesh(4, 1, 1));
    assert_eq!((files.file_bytes(), held(&files, "actor: optimizer moments")), (2 * parameters(), 0));
    assert_eq!(held(&files, "actor: moments that"), 2 * block, "a quarter of both, while the unit is updated");
    let files = footprint("actor = { zero_stage = 3, offload = 'all' }", Stage::Sft, mesh(4, 1, 1));
    assert_eq!(files.file_bytes(), 3 * parameters());
    assert!(files.to_string().contains("in files"), "{files}");

    // Alone, a rank has whole weights: those that are not trained are read out of files a unit at a time.
    for (precision, number) in [("f32", 4), ("bf16", 2)] {
        let text = format!("run.precision = '{precision}'\nactor.offload = 'all'\nreference.offload = 'all'");
        let files = footprint(&text, Stage::Ppo, mesh(1, 1, 1));
        assert_eq!(held(&files, "actor: weights"), 4 * parameters());
        assert_eq!(held(&files, "reference: weights"), 0);
        assert_eq!(files.file_bytes(), (8 + number) * parameters(), "moments and reference");
        assert_eq!(held(&files, "reference: a unit"), number * block);
    }
}

#[test]
fn cuts_take_blocks_apart() {
    let whole = Units::of(&spec(), Head::Language, 1, 1);
    assert_eq!(whole.total(), parameters());
    let norms = 2 * 32;
    let half = Units::of(&spec(), Head::Language, 2, 1);
    assert_eq!(half.block, (whole.block - norms) / 2 + norms);
    assert_eq!(half.ends, (whole.ends - 32) / 2 + 32);
    // Two key-value heads on four ranks: two ranks hold each.
    let quarter = Units::of(&spec(), Head::Language, 4, 1);
    assert_eq!(quarter.block, (whole.block - norms) / 4 + norms + (2 * 8 * 32) / 2);
    assert_eq!(Units::of(&spec(), Head::Language, 1, 2).blocks, 2);

    let tensor = footprint("", Stage::Sft, mesh(1, 2, 1));
    // Four lanes would be one here: 4 forwards of 4096 tokens; two sums in each of two passes of three blocks, and two more.
    assert_eq!(tensor.sent_bytes(), 14 * 4 * 4096 * 32 * 4);
    let pipeline = footprint("", Stage::Sft, mesh(1, 1, 2));
    assert_eq!(pipeline.sent_bytes(), 4 * 4096 * 32 * 4);
}

#[test]
fn adapters_train_little_and_need_no_reference() {
    let plain = footprint("", Stage::Ppo, mesh(2, 1, 1));
    let lora = footprint("lora = { rank = 2, targets = ['q_proj', 'down_proj'] }", Stage::Ppo, mesh(2, 1, 1));
    // Three blocks; q: 32 to 32, down: 48 to 32.
    let adapters = 4 * 3 * 2 * (32 + 32 + 48 + 32);
    assert_eq!(held(&lora, "actor: adapters"), adapters);
    assert_eq!(held(&lora, "actor: gradients"), adapters);
    assert_eq!(held(&lora, "actor: optimizer moments"), 2 * adapters);
    assert_eq!(held(&lora, "critic: gradients"), held(&plain, "critic: gradients"));
    assert!(held(&plain, "reference: weights") == 4 * parameters());
    assert!(lora.held().iter().all(|part| !part.what.starts_with("reference")));
    assert_eq!(held(&lora, "actor: copy"), 4 * parameters(), "merged there");
    assert!(plain.held().iter().all(|part| !part.what.starts_with("actor: copy")));
    let all = Units::of_adapters(&spec(), &LoraConfig { rank: 1, ..Default::default() }, mesh(1, 1, 1));
    assert_eq!(all.block, (32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 48) + (48 + 32));
}

#[test]
fn what_is_never_there_at_once_does_not_add_up() {
    let text = "actor.zero_stage = 3\nppo.inference_tp_size = 2\nppo.tokens_per_micro_batch = 1024\n";
    let released = footprint(text, Stage::Ppo, mesh(2, 1, 1));
    let sum = |wanted: Option<Phase>| -> u64 {
        released.held().iter().filter(|part| part.phase == wanted).map(|part| part.bytes).sum()
    };
    let phases = [Phase::Computing(Role::Actor), Phase::Computing(Role::Critic), Phase::Generating];
    let phases = phases.map(|phase| sum(Some(phase)));
    assert!(phases.iter().all(|&bytes| bytes > 0));
    assert_eq!(released.memory_bytes(), sum(None) + phases.into_iter().max().unwrap());
    let text = format!("{text}ppo.release_inference_cache = false\nppo.pin_parameters = true");
    let kept = footprint(&text, Stage::Ppo, mesh(2, 1, 1));
    assert!(kept.memory_bytes() > released.memory_bytes());
    // Packed matrices go in any case: the next step would make them stale.
    let gone: Vec<&Held> = kept.held().iter().filter(|part| part.phase == Some(Phase::Generating)).collect();
    assert!(gone.len() == 1 && gone[0].what.contains("packed"), "{gone:?}");
}

/// Passes of few tokens keep the copies of all blocks, and large ones what a pass makes that has more activations.
#[test]
fn small_passes_keep_their_copies() {
    let copies = |tokens: usize| {
        let text = format!("run.precision = 'bf16'\ndata.max_tokens = 64\nsft.tokens_per_micro_batch = {tokens}");
        held(&footprint(&text, Stage::Sft, mesh(1, 1, 1)), "actor: weights to compute with")
    };
    let units = Units::of(&spec(), Head::Language, 1, 1);
    assert_eq!(copies(1023), 2 * units.total());
    assert_eq!(copies(4096), 2 * units.largest());
    assert!((copies(4096)..=copies(1023)).contains(&copies(1024)));
}

#[test]
fn signs_are_a_thirty_second() {
    let exact = footprint("", Stage::Sft, mesh(4, 1, 1)).sent_bytes();
    let signs = footprint("sft.optimizer.kind = 'one_bit_adam'", Stage::Sft, mesh(4, 1, 1));
    assert_eq!(signs.sent_bytes(), 2 * (exact / 2).div_ceil(32));
    assert_eq!(held(&signs, "actor: errors fed back"), 5 * parameters());
    let majority = footprint("sft.optimizer.kind = 'sign_sgd'", Stage::Sft, mesh(4, 1, 1));
    assert_eq!(held(&majority, "actor: optimizer moments"), 4 * parameters());
}

#[test]
fn only_what_a_rank_lacks_is_moved_by_the_switch() {
    let switch = |text: &str, mesh: Mesh| {
        let footprint = footprint(text, Stage::Ppo, mesh);
        footprint.sent().iter().find(|part| part.what.contains("switch")).map_or(0, |part| part.bytes)
    };
    let whole = 4 * parameters();
    assert_eq!(switch("", mesh(2, 1, 1)), 0);
    assert_eq!(switch("ppo.inference_tp_size = 2", mesh(2, 1, 1)), 0, "all is there");
    assert_eq!(switch("ppo.inference_tp_size = 2", mesh(1, 2, 1)), 0, "just the part is there");
    assert_eq!(switch("", mesh(1, 2, 1)), whole / 2);
    assert_eq!(switch("", mesh(1, 1, 2)), whole / 2);
    assert_eq!(switch("actor.zero_stage = 3", mesh(4, 1, 1)), whole / 4 * 3);
    let half = 4 * Units::of(&spec(), Head::Language, 2, 1).total();
    assert_eq!(switch("actor.zero_stage = 3\nppo.inference_tp_size = 2", mesh(4, 1, 1)), half / 4 * 3);
}

#[test]
fn the_table_names_the_mesh() {
    let text = Footprint::new(&config(""), Stage::Ppo, &spec(), mesh(2, 4, 1), 4).to_string();
    for part in ["8 ranks on 4 nodes: 2 data x 4 tensor x 1 pipeline", "span several nodes", "memory of a rank"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.contains("sent by a rank in an iteration, at most"), "{text}");
    let alone = footprint("", Stage::Sft, mesh(1, 1, 1)).to_string();
    assert!(!alone.contains("ranks") && alone.starts_with("memory"), "{alone}");
}

#[test]
fn in_bf16_what_is_trained_stays_in_f32() {
    let bytes = |precision: &str, what: &str| -> u64 {
        let text = format!("run.precision = \"{precision}\"");
        let found = footprint(&text, Stage::Ppo, mesh(1, 1, 1));
        let parts = found.held().iter().filter(|part| part.what.starts_with(what));
        parts.map(|part| part.bytes).sum()
    };
    let weights = bytes("f32", "reference: weights");
    assert!(weights > 0);
    assert_eq!(2 * bytes("bf16", "reference: weights"), weights);
    assert_eq!(bytes("bf16", "actor: gradients"), bytes("f32", "actor: gradients"));
    assert_eq!(bytes("bf16", "actor: optimizer moments"), bytes("f32", "actor: optimizer moments"));
    // The weights themselves, and of a copy of half the size the largest unit.
    let units = Units::of(&spec(), Head::Language, 1, 1);
    let copied = bytes("bf16", "actor: weights") - bytes("f32", "actor: weights");
    assert_eq!(copied, 2 * units.largest());
    assert!(bytes("bf16", "actor: activations") < bytes("f32", "actor: activations"));
}

#[test]
fn weights_of_8_bits_are_what_such_a_model_holds() {
    let base = "run.precision = 'bf16'\n";
    let narrow = footprint(base, Stage::Ppo, mesh(1, 1, 1));
    let text = format!("{base}reference.weights = 'int8'\nreward_model.weights = 'int8'");
    let int8 = footprint(&text, Stage::Ppo, mesh(1, 1, 1));
    for (role, head) in [("reference", Head::Language), ("reward model", Head::Scalar)] {
        let model = Model::initial(spec(), head, 0).unwrap();
        let model = model.frozen(Precision::Bf16, WeightFormat::Int8).unwrap();
        let found = held(&int8, &format!("{role}: weights, 8 bits"));
        assert_eq!(found, model.computed_bytes().unwrap() as u64);
        assert!(found < held(&narrow, &format!("{role}: weights")));
    }
    assert_eq!(held(&int8, "actor: weights"), held(&narrow, "actor: weights"));
    assert!(int8.memory_bytes() < narrow.memory_bytes());
    // Two ranks hold half of the matrices each.
    let halves = footprint(&text, Stage::Ppo, mesh(1, 2, 1));
    assert!(held(&halves, "reference: weights, 8 bits") < held(&int8, "reference: weights, 8 bits"));

    let rollouts = footprint(&format!("{base}ppo.rollout_weights = 'int8'"), Stage::Ppo, mesh(1, 1, 1));
    let copy = held(&rollouts, "actor: copy that generates, 8 bits");
    assert_eq!(copy, held(&int8, "reference: weights, 8 bits"));
    let ends = Units::of(&spec(), Head::Language, 1, 1).ends;
    assert_eq!(held(&rollouts, "actor: matrices packed"), 2 * ends, "the head");
    let generating = |footprint: &Footprint| -> u64 {
        let parts = footprint.held().iter().filter(|part| part.phase == Some(Phase::Generating));
        parts.map(|part| part.bytes).sum()
    };
    assert!(generating(&rollouts) < generating(&narrow) + copy);
}
