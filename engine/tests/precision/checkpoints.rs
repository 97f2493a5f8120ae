//! Checkpoints hold the master weights: a run that was stopped goes on as if it had not been, whatever it computes in.

use tandem_engine::checkpoint::{load_engine, save_engine};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{ParallelConfig, ZeroStage};
use tandem_engine::{Engine, Precision, Train};
use tandem_store::RunDir;

use crate::ranks::on_ranks;
use crate::toy::{Layout, engine, optimizer, spec, train, weight_bits};

/// Weights, and the norms of gradients.
type State = (Vec<u32>, Vec<u64>);

fn steps(engine: &mut Engine<Train>, layout: &Layout) -> State {
    let norms = train(engine, layout, 3, 9).unwrap();
    (weight_bits(engine.model()).unwrap(), norms)
}

#[test]
fn three_steps_and_three_more_are_six() {
    let of = |world, stage, tensor, pipeline| {
        let config = ParallelConfig { data_lanes: 4, tensor_lanes: 2, tensor, pipeline, ..ParallelConfig::default() };
        Layout { precision: Precision::Bf16, ..Layout::of(world, stage, config) }
    };
    let layouts = [
        of(1, ZeroStage::Zero, 1, 1),
        of(2, ZeroStage::One, 1, 1),
        of(4, ZeroStage::Three, 2, 1),
        of(4, ZeroStage::Two, 1, 2),
    ];
    for gated in [true, false] {
        let mut all = Vec::new();
        for writer in &layouts {
            let dir = tempfile::tempdir().unwrap();
            let run = RunDir::open(dir.path()).unwrap();
            let expected = on_ranks(writer.world, |world| {
                let mut engine = engine(&spec(gated), &writer.placement(&world).unwrap()).unwrap();
                let first = steps(&mut engine, writer);
                let mut staging = (world.rank() == 0).then(|| run.checkpoints().stage(3).unwrap());
                save_engine(&engine, "actor", staging.as_mut()).unwrap();
                staging.map(|staging| staging.publish(serde_json::json!({})).unwrap());
                (first, steps(&mut engine, writer))
            });
            let published = run.checkpoints().open(3).unwrap().unwrap();
            for reader in &layouts {
                let found = on_ranks(reader.world, |world| {
                    let placement = reader.placement(&world).unwrap();
                    let loaded =
                        load_engine(&spec(gated), Head::Language, optimizer(), "actor", &published, &placement);
                    let mut engine = loaded.unwrap();
                    assert_eq!((engine.optimizer().step(), engine.model().precision()), (3, Precision::Bf16));
                    let loaded = weight_bits(engine.model()).unwrap();
                    (loaded, steps(&mut engine, reader))
                });
                assert!(found[0].0 == expected[0].0.0, "{writer:?} to {reader:?}: other weights are read");
                assert!(found[0].1 == expected[0].1, "{writer:?} to {reader:?}: the run goes on otherwise");
            }
            all.push(expected.into_iter().next());
        }
        assert!(all.iter().all(|run| *run == all[0]), "writers differ");
    }
    // What is lost if weights are kept in what passes compute in: most low bits of the masters are not zero.
    let engine = engine(&spec(true), &layouts[0].placement(&solo()).unwrap()).unwrap();
    let bits = weight_bits(engine.model()).unwrap();
    assert!(bits.iter().filter(|&&bits| bits & 0xffff != 0).count() > bits.len() / 2);
}

fn solo() -> std::sync::Arc<dyn tandem_collective::Collective> {
    std::sync::Arc::new(tandem_collective::Solo::new())
}
