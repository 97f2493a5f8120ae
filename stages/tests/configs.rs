//! Every configuration in `configs/` can be run: it parses, its values lie in their ranges, its files are there, and each
//! stage finds the model that it starts from.

use std::path::{Path, PathBuf};

use tandem_stages::config::{Config, Origin, RuleConfig, Stage};
use tandem_stages::footprint::Footprint;

/// The workspace: paths in configurations are relative to it.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn configs() -> Vec<(PathBuf, Config)> {
    let files = std::fs::read_dir(root().join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let configs: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| (path.clone(), Config::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"))))
        .collect();
    assert!(configs.len() >= 2);
    configs
}

#[test]
fn every_configuration_can_be_run() {
    for (path, config) in configs() {
        let name = path.display();
        config.check(&Stage::ALL, &Origin::File(path.clone())).unwrap_or_else(|error| panic!("{error}"));
        let pipeline = Some(config.run.output_dir.as_path());
        config.sft_model().unwrap_or_else(|error| panic!("{name}: {error}"));
        config.reward_init(pipeline).unwrap_or_else(|error| panic!("{name}: {error}"));
        config.ppo_models(pipeline).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn the_files_they_name_are_there() {
    for (path, config) in configs() {
        let rules = config.eval.judge.iter().chain(config.ppo.reward.rules.iter().flatten());
        let lexicons = rules.filter_map(|RuleConfig { path, .. }| path.clone());
        for file in config.data.sources.into_iter().map(|source| source.path).chain(lexicons) {
            assert!(root().join(&file).is_file(), "{}: {} is missing", path.display(), file.display());
        }
    }
}

#[test]
fn no_two_write_to_the_same_directory() {
    let mut directories: Vec<PathBuf> = configs().into_iter().map(|(_, config)| config.run.output_dir).collect();
    let all = directories.len();
    directories.sort();
    directories.dedup();
    assert_eq!(directories.len(), all);
}

/// Configurations for several ranks, with their number and that of the nodes.
const FOR_RANKS: [(&str, usize, usize); 4] =
    [("laptop-2-ranks", 2, 1), ("one-node-8-gpus", 8, 1), ("cluster-64-gpus", 64, 8), ("cpu-cluster-mpi", 8, 8)];

/// What a rank holds and sends, by stage.
fn plan(name: &str) -> [Footprint; 3] {
    let (_, ranks, nodes) = *FOR_RANKS.iter().find(|(known, ..)| *known == name).unwrap();
    let path = root().join(format!("configs/{name}.toml"));
    let config = Config::load(&path, &[]).unwrap();
    let mesh = config.mesh(ranks, &Stage::ALL, &Origin::File(path)).unwrap();
    let spec = match (&config.model.shape, &config.model.new, &config.tokenizer.train) {
        (Some(shape), ..) => shape.spec(),
        (None, Some(new), Some(train)) => new.spec(train.vocab_size),
        _ => panic!("{name} has no shape"),
    };
    Stage::ALL.map(|stage| Footprint::new(&config, stage, &spec, mesh, nodes))
}

/// Compares the figures of one stage; `held` and `sent` are in f32 numbers.
fn assert_plan(footprint: &Footprint, held: &[(&str, u64)], sent: &[(&str, u64)]) {
    let found: Vec<(&str, u64)> = footprint.held().iter().map(|p| (p.what.as_str(), p.bytes + p.file_bytes)).collect();
    let wanted: Vec<(&str, u64)> = held.iter().map(|&(what, numbers)| (what, 4 * numbers)).collect();
    assert_eq!(found, wanted, "{footprint}");
    let found: Vec<(&str, u64)> = footprint.sent().iter().map(|part| (part.what.as_str(), part.bytes / 4)).collect();
    assert_eq!(found, sent, "{footprint}");
}

#[test]
fn two_ranks_of_a_laptop() {
    let [sft, _, _] = plan("laptop-2-ranks");
    // A million parameters: an embedding of 2048 x 128 that is the head too, and four blocks.
    let (ends, block) = (2048 * 128 + 128, 128 * (256 + 128 + 3 * 352) + 2 * 128);
    let half = (ends + 4 * block) / 2;
    // Of a token in a block: two hidden states, q, k and v, what is attended, a sum per head, gate and up; in one block at a
    // time also two normed hidden states and the product of gate and up.
    let activations = 5 * (2 * 128 + 256 + 128 + 4 + 704) + 2 * 128 + 352;
    assert_plan(
        &sft,
        &[
            ("actor: weights", half),
            ("actor: units gathered at once, 2", 2 * ends),
            ("actor: gradients", half),
            ("actor: gradients under way, 2 units", 2 * ends),
            ("actor: optimizer moments", 2 * half),
            ("actor: activations of 4096 tokens", 4096 * activations),
        ],
        // Two of four lanes, each with eight sequences in one forward; gathered twice and reduced once for each.
        &[("actor: weights and gradients", 2 * 3 * half)],
    );
}

/// Llama 3 8B has 8,030,261,248 parameters (Dubey et al., 2024), of which these are the norms.
const LLAMA: u64 = 8_030_261_248;
const LLAMA_NORMS: u64 = (2 * 32 + 1) * 4096;
/// Its embedding or its head.
const LLAMA_TABLE: u64 = 128_256 * 4096;
/// What the backward of a block needs per token.
const LLAMA_ACTIVATIONS: u64 = 4 * 4096 + 6144 + 4096 + 32 + 2 * 14_336 + 14_336;

#[test]
fn eight_devices_of_a_node() {
    let [sft, _, ppo] = plan("one-node-8-gpus");
    let (ends, eighth) = (2 * LLAMA_TABLE + 4096, LLAMA / 8);
    let activations = 4096 * (32 * 4096 + 2 * LLAMA_ACTIVATIONS);
    let trained = |name: &'static str, weights: u64, ends: u64| {
        let part = |what: &str| -> &'static str { format!("{name}: {what}").leak() };
        [
            (part("weights"), weights),
            (part("units gathered at once, 2"), 2 * ends),
            (part("gradients"), weights),
            (part("gradients under way, 2 units"), 2 * ends),
            (part("optimizer moments"), 2 * weights),
            (part("activations of 4096 tokens"), activations),
        ]
    };
    // 128 sequences of 1024 tokens in eight lanes: 16 in a lane, four in a forward.
    assert_plan(&sft, &trained("actor", eighth, ends), &[("actor: weights and gradients", 4 * 3 * 7 * eighth)]);

    // Critic, reference and reward model have a table less, and a vector instead.
    let (scalar, scalar_ends) = ((LLAMA - LLAMA_TABLE + 4096) / 8, LLAMA_TABLE + 2 * 4096);
    let mut held = trained("actor", eighth, ends).to_vec();
    held.extend(trained("critic", scalar, scalar_ends));
    held.extend([
        ("reference: weights", eighth),
        ("reference: units gathered at once, 2", 2 * ends),
        ("reward model: weights", scalar),
        ("reward model: units gathered at once, 2", 2 * scalar_ends),
        ("actor: copy that generates", (LLAMA - LLAMA_NORMS) / 8 + LLAMA_NORMS),
        ("actor: matrices packed for decoding", (LLAMA - LLAMA_NORMS) / 8 + LLAMA_NORMS),
        // One of the eight key-value heads in each of 32 blocks.
        ("cache of 64 sequences of 1024 tokens", 2 * 32 * 64 * 1024 * 128),
    ]);
    // Four updates of 128 samples, so 16 in a lane and four in a forward; all 512 are measured in 16 forwards.
    let rounds = 4 * 4;
    let copy = (LLAMA - LLAMA_NORMS) / 8 + LLAMA_NORMS;
    assert_plan(
        &ppo,
        &held,
        &[
            ("actor: weights and gradients", rounds * 3 * 7 * eighth),
            ("critic: weights and gradients", rounds * 3 * 7 * scalar),
            ("critic: measuring responses", 16 * 7 * scalar),
            ("reference: measuring responses", 16 * 7 * eighth),
            ("reward model: measuring responses", 16 * 7 * scalar),
            ("actor: switch to generation", copy * 7 / 8),
            // Two sums in each of 32 blocks and two more, of 512 x 1024 tokens, each sent in eighths and back.
            ("actor: sums while generating", 66 * 512 * 1024 * 4096 * 2 * 7 / 8),
        ],
    );
    assert!(ppo.memory_bytes() < 80 << 30, "{ppo}");
}

#[test]
fn eight_nodes_of_eight_devices() {
    let [sft, reward, ppo] = plan("cluster-64-gpus");
    // A quarter of everything but the norms; half of the blocks, and both tables, as at either end of the pipeline.
    let block = (LLAMA - 2 * LLAMA_TABLE - LLAMA_NORMS) / 32 / 4 + 2 * 4096;
    let ends = 2 * LLAMA_TABLE / 4 + 4096;
    let mine = ends + 16 * block;
    let slice = ends / 8 + 16 * block / 8;
    // 256 sequences in eight lanes: 32 in a lane, four in a forward; two forwards are under way at a time.
    let rounds = 8;
    let activations = 4096 * (2 * 16 * 4096 + 2 * (4 * 4096 + (LLAMA_ACTIVATIONS - 4 * 4096) / 4));
    let tokens = rounds * 4096;
    assert_plan(
        &sft,
        &[
            ("actor: weights", mine),
            ("actor: gradients", slice),
            ("actor: gradients under way, 2 units", 2 * ends),
            ("actor: optimizer moments", 2 * slice),
            ("actor: activations of 4096 tokens", activations),
        ],
        &[
            ("actor: weights and gradients", (rounds + 1) * 7 * slice),
            // Two sums in 16 blocks, three times with recomputation, and two more.
            ("actor: sums inside blocks", (2 * 16 * 3 + 2) * tokens * 4096 * 2 * 3 / 4),
            ("actor: between pipeline stages", tokens * 4096),
        ],
    );
    assert!(reward.held()[0].what.starts_with("reward model"));
    // A copy in eighths of one of which a rank holds a part by chance: one of eight parts, in quarters and halves.
    let copy = (LLAMA - LLAMA_NORMS) / 8 + LLAMA_NORMS;
    let switch = ppo.sent().iter().find(|part| part.what.contains("switch")).unwrap();
    assert_eq!(switch.bytes, 4 * copy * 7 / 8);
    assert!(ppo.memory_bytes() < 40 << 30, "{ppo}");
    assert!(ppo.to_string().starts_with("64 ranks on 8 nodes: 8 data x 4 tensor x 2 pipeline\n"), "{ppo}");
}

#[test]
fn eight_machines_without_accelerators() {
    let [sft, reward, _] = plan("cpu-cluster-mpi");
    // SmolLM2-135M: an embedding of 49152 x 576 that is the head too, and thirty blocks, 134,515,008 parameters.
    let all = 134_515_008;
    // Of a token in a block, as above; of one block all.
    let block = 2 * 576 + 15 * 64 + 576 + 9 + 2 * 1536;
    let activations = 31 * block + 2 * 576 + 1536;
    assert_plan(
        &sft,
        &[
            ("actor: weights", all),
            ("actor: gradients", all),
            ("actor: optimizer moments", 2 * all / 8),
            ("actor: errors fed back", all + all / 8),
            ("actor: activations of 1024 tokens", 1024 * activations),
        ],
        // One bit for each number, to its owner and back.
        &[("actor: weights and gradients", 2 * 7 * all / 8 / 32)],
    );
    // The reward model has a scalar head more; its moments are in files.
    let scored = all + 576;
    assert_eq!(reward.file_bytes(), 4 * 2 * scored / 8);
    assert_eq!(reward.sent_bytes(), 4 * 2 * 7 * scored / 8);
}
