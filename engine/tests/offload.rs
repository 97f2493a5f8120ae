//! What is kept in files changes no result and leaves memory when nobody works on it.
#![cfg(target_os = "linux")]

#[path = "parallel/ranks.rs"]
#[allow(unreachable_pub)]
mod ranks;
#[path = "compressed/toy.rs"]
#[allow(dead_code, unreachable_pub)]
mod toy;

use std::path::Path;

use tandem_engine::checkpoint::{load_engine, save_engine};
use tandem_engine::generate::{Completion, Request, SamplingKey, generate};
use tandem_engine::model::Blueprint;
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{Offload, Placement, ZeroStage};
use tandem_engine::train::OptimizerKind;
use tandem_engine::{Packed, Precision};
use tandem_kernels::sample::SamplingParams;
use tandem_store::RunDir;

use crate::ranks::on_ranks;
use crate::toy::{KINDS, bits, config, engine, placement, rows, spec, step, weights};

/// Past the freeze of all kinds, between two exchanges.
const STEPS: u64 = 13;

/// KiB that this process has in memory of files in `dir`, and how many there are.
fn resident(dir: &Path) -> (usize, usize) {
    let (maps, dir) = (std::fs::read_to_string("/proc/self/smaps").unwrap(), dir.display().to_string());
    let (mut is_ours, mut kib, mut files) = (false, 0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if is_ours => kib += words.next().unwrap().parse::<usize>().unwrap(),
            // The line of a mapping begins with its addresses.
            Some(first) if !first.ends_with(':') => {
                is_ours = line.contains(&dir);
                files += usize::from(is_ours);
            }
            _ => {}
        }
    }
    (kib, files)
}

/// Trains with what `offload` says in files, with a checkpoint on the way; the bits of the weights of each rank.
fn trained(kind: OptimizerKind, world: usize, stage: ZeroStage, offload: Offload) -> Vec<Vec<u32>> {
    let run = tempfile::tempdir().unwrap();
    let run = RunDir::open(run.path()).unwrap();
    on_ranks(world, |ranks| {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let check = |when: &str| {
            let (kib, files) = resident(dir);
            assert_eq!((kib, files > 0), (0, offload != Offload::None), "{kind:?}, {world} ranks, {offload:?}: {when}");
        };
        let place = Placement { offload, offload_dir: Some(dir.to_path_buf()), ..placement(&ranks, stage, 1) };
        let settings = config(kind, 4e-3, 2 * STEPS);
        let mut engine = engine(settings, &place).unwrap();
        check("made");
        for at in 1..=STEPS {
            assert!(step(&mut engine).unwrap().1.applied);
            check(&format!("step {at}"));
        }
        let mut staging = (ranks.rank() == 0).then(|| run.checkpoints().stage(STEPS).unwrap());
        save_engine(&engine, "model", staging.as_mut()).unwrap();
        if let Some(staging) = staging {
            staging.publish(serde_json::json!({})).unwrap();
        }
        if stage != ZeroStage::Three {
            check("saved");
        }
        drop(engine);
        ranks.barrier(tandem_collective::Tag::new("published", 0)).unwrap();
        let published = run.checkpoints().open(STEPS).unwrap().unwrap();
        let mut engine = load_engine(&spec(), Head::Language, settings, "model", &published, &place).unwrap();
        check("loaded");
        assert!(step(&mut engine).unwrap().1.applied);
        check("went on");
        bits(&weights(&engine))
    })
}

#[test]
fn files_hold_what_memory_holds_and_none_of_it_stays_there() {
    for kind in [KINDS.as_slice(), &[OptimizerKind::AdamW]].concat() {
        for world in [1, 2] {
            let plain = trained(kind, world, ZeroStage::Zero, Offload::None);
            assert!(trained(kind, world, ZeroStage::Zero, Offload::Optimizer) == plain, "{kind:?}, {world} ranks");
        }
    }
    let plain = trained(OptimizerKind::AdamW, 2, ZeroStage::Three, Offload::None);
    assert!(trained(OptimizerKind::AdamW, 2, ZeroStage::Three, Offload::All) == plain, "slices of weights");
}

/// What a model that nobody trains says and samples, and how many files it has.
fn said(precision: Precision, offload: Offload) -> (Vec<Vec<f32>>, Vec<Completion>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let offload_dir = Some(dir.path().to_path_buf());
    let placement = Placement { precision, is_frozen: true, offload, offload_dir, ..Placement::solo() };
    let model = Blueprint::initial(spec(), Head::Language, 7).place(&placement).unwrap();
    let mut said = Vec::new();
    // Small passes and one of more tokens than those whose copies are kept.
    for sequences in [rows(1), rows(2), (3..12).flat_map(rows).collect()] {
        let batch = Packed::from_sequences(&sequences);
        let targets: Vec<u32> = (0..batch.tokens() as u32).collect();
        said.push(model.log_probs(&batch, &targets, &batch.ids).unwrap().logp.to_vec1().unwrap());
        assert_eq!(resident(dir.path()).0, 0, "after a pass");
    }
    let request = Request {
        prompt: vec![1, 2, 3],
        samples: vec![0, 1],
        max_new_tokens: 8,
        stop: Vec::new(),
        sampling: SamplingParams::default(),
    };
    let mut sampled = Vec::new();
    for step in 0..2 {
        let key = SamplingKey { seed: 1, step };
        sampled.extend(generate(&model, std::slice::from_ref(&request), 2, 64, key, &mut |_, _, _| {}).unwrap());
    }
    (said, sampled, resident(dir.path()).1)
}

#[test]
fn models_that_nobody_trains_are_read_out_of_files() {
    for precision in [Precision::F32, Precision::Bf16] {
        let (said_in_memory, sampled_in_memory, files) = said(precision, Offload::None);
        assert_eq!(files, 0);
        let (said, sampled, files) = said(precision, Offload::All);
        assert_eq!(files, 1 + spec().layers, "{precision:?}");
        assert!(said == said_in_memory && sampled == sampled_in_memory, "{precision:?}");
    }
}
