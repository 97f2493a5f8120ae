//! The stages on many ranks leave what one rank leaves, to the byte, and go on where any number of ranks has stopped.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tandem_collective::Threads;
use tandem_stages::cli::{Launch, Outcome};
use tandem_stages::config::{Config, LoraExport, Stage as Name};
use tandem_stages::ranks::on_threads;
use tandem_stages::stop::StopFlag;
use tandem_stages::{ppo, reward, sft};
use tandem_tests::runs::{Stage, assert_same, config, launch, traces, write_data};

const STAGES: [(&str, Name, Stage); 3] =
    [("sft", Name::Sft, sft::run), ("reward", Name::Reward, reward::run), ("ppo", Name::Ppo, ppo::run)];

/// A way to lay out a run.
#[derive(Clone, Copy, Debug)]
struct Layout {
    ranks: usize,
    zero_stage: u8,
    tensor: usize,
    pipeline: usize,
    generating: usize,
}

const LAYOUTS: [Layout; 6] = [
    Layout { ranks: 2, zero_stage: 0, tensor: 1, pipeline: 1, generating: 1 },
    Layout { ranks: 2, zero_stage: 1, tensor: 1, pipeline: 1, generating: 2 },
    Layout { ranks: 2, zero_stage: 2, tensor: 2, pipeline: 1, generating: 1 },
    Layout { ranks: 4, zero_stage: 3, tensor: 1, pipeline: 1, generating: 2 },
    Layout { ranks: 4, zero_stage: 3, tensor: 2, pipeline: 1, generating: 2 },
    Layout { ranks: 4, zero_stage: 2, tensor: 1, pipeline: 2, generating: 2 },
];

fn laid_out(config: &Config, layout: Layout) -> Config {
    let mut config = config.clone();
    let Layout { zero_stage, tensor, pipeline, generating, .. } = layout;
    (config.parallel.tensor, config.parallel.pipeline) = (tensor, pipeline);
    config.ppo.inference_tp_size = generating;
    for role in [&mut config.actor, &mut config.critic, &mut config.reference, &mut config.reward_model] {
        role.zero_stage = zero_stage;
    }
    config
}

/// Runs a stage on the ranks of `layout`; `stop` is the number of safe points after which it is asked to stop.
fn run(
    config: &Config,
    layout: Layout,
    name: Name,
    stage: Stage,
    dir: &Path,
    pipeline: &Path,
    stop: Option<u64>,
) -> Outcome {
    let config = laid_out(config, layout);
    let stop = || stop.map_or_else(StopFlag::default, |points| StopFlag::after(points as _));
    if layout.ranks == 1 {
        return stage(&launch(&config, stop()), dir, Some(pipeline)).unwrap();
    }
    let mesh = config.mesh(layout.ranks, &[name], &tandem_stages::config::Origin::Defaults).unwrap();
    let tandem_engine::parallel::Mesh { data, .. } = mesh;
    assert_eq!(data * layout.tensor * layout.pipeline, layout.ranks);
    let launch = Launch { mesh, stop: stop(), ..Launch::new(config) };
    let worlds = Threads::world(layout.ranks, Duration::from_secs(120));
    let outcomes = on_threads(worlds, Some(2), |world| stage(&launch.on(world), dir, Some(pipeline))).unwrap();
    outcomes[0]
}

/// What a run leaves, but for the division of experience into files, which says who has sampled it.
fn left(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = traces(dir);
    found.retain(|name, _| !name.starts_with("experience"));
    // What ranks send each other depends on how many there are.
    if let Some(log) = found.get_mut("metrics.jsonl") {
        let text = String::from_utf8(log.clone()).unwrap();
        let rows = text.lines().map(|line| {
            let mut row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
            row.remove("wire_bytes");
            serde_json::to_string(&row).unwrap() + "\n"
        });
        *log = rows.collect::<String>().into_bytes();
    }
    found
}

fn lanes(mut config: Config) -> Config {
    (config.parallel.data_lanes, config.parallel.tensor_lanes) = (4, 2);
    config
}

const ALONE: Layout = Layout { ranks: 1, zero_stage: 0, tensor: 1, pipeline: 1, generating: 1 };

#[test]
fn every_stage_leaves_what_one_rank_leaves() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data.jsonl");
    write_data(&data);
    let config = lanes(config(&data));
    let pipeline = temp.path().join("pipeline");
    for (name, which, stage) in STAGES {
        assert_eq!(run(&config, ALONE, which, stage, &pipeline.join(name), &pipeline, None), Outcome::Finished);
        let want = left(&pipeline.join(name));
        assert!(want.keys().any(|name| name.ends_with("model.safetensors")), "{:?}", want.keys());
        for (number, layout) in LAYOUTS.into_iter().enumerate() {
            let dir = temp.path().join(format!("{name}-{number}"));
            assert_eq!(run(&config, layout, which, stage, &dir, &pipeline, None), Outcome::Finished);
            assert_same(&want, &left(&dir), &format!("{name} on {layout:?}"));
        }
    }
}

#[test]
fn a_run_goes_on_with_any_number_of_ranks() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data.jsonl");
    write_data(&data);
    let config = lanes(config(&data));
    let pipeline = temp.path().join("pipeline");
    for (name, which, stage) in STAGES {
        run(&config, ALONE, which, stage, &pipeline.join(name), &pipeline, None);
        let want = left(&pipeline.join(name));
        let dir = temp.path().join(format!("{name}-elastic"));
        // Four ranks, then one, then two, and at last four of another layout.
        for (layout, points) in [(LAYOUTS[3], 1), (ALONE, 2), (LAYOUTS[2], 1)] {
            assert_eq!(run(&config, layout, which, stage, &dir, &pipeline, Some(points)), Outcome::Stopped, "{name}");
        }
        assert_eq!(run(&config, LAYOUTS[5], which, stage, &dir, &pipeline, None), Outcome::Finished);
        assert_same(&want, &left(&dir), &format!("{name}, continued by other ranks"));
    }
}

#[test]
fn adapters_are_trained_in_every_stage() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data.jsonl");
    write_data(&data);
    let mut config = lanes(config(&data));
    let pipeline = temp.path().join("pipeline");
    run(&config, ALONE, Name::Sft, sft::run, &pipeline.join("sft"), &pipeline, None);
    (config.lora.rank, config.lora.export) = (4, LoraExport::Both);
    config.model.path = Some(pipeline.join("sft/export").display().to_string());
    for (name, which, stage) in STAGES {
        let whole = temp.path().join(format!("{name}-whole"));
        run(&config, ALONE, which, stage, &whole, &pipeline, None);
        let want = left(&whole);
        assert!(whole.join("adapter/adapter_model.safetensors").is_file(), "{name} has left no adapter");
        assert_ne!(want["export/model.safetensors"], traces(&pipeline.join("sft"))["export/model.safetensors"]);
        let dir = temp.path().join(format!("{name}-stopped"));
        assert_eq!(run(&config, LAYOUTS[3], which, stage, &dir, &pipeline, Some(1)), Outcome::Stopped, "{name}");
        assert_eq!(run(&config, LAYOUTS[3], which, stage, &dir, &pipeline, None), Outcome::Finished);
        // The sums over pieces of what adapters share have another order than on one rank.
        assert_eq!(left(&dir).keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
        let again = temp.path().join(format!("{name}-again"));
        run(&config, LAYOUTS[3], which, stage, &again, &pipeline, None);
        assert_same(&left(&again), &left(&dir), &format!("{name} with adapters, stopped"));
    }
}
