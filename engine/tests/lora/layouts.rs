//! Every layout trains adapters as one rank does, bit for bit, and holds no more than they need.

use tandem_engine::model::unit::Head;
use tandem_engine::parallel::Placement;
use tandem_engine::parallel::{ParallelConfig, ZeroStage};
use tandem_engine::{Engine, LoraConfig, Model, Recompute, Train};

use crate::adapted::{adapted, all_bits, config};
use crate::ranks::on_ranks;
use crate::toy::{Layout, optimizer, spec, train};

const STAGES: [ZeroStage; 4] = [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two, ZeroStage::Three];

fn engine(gated: bool, lora: &LoraConfig, placement: &Placement) -> Engine<Train> {
    let base = Model::initial(spec(gated), Head::Language, 7).unwrap().place(placement).unwrap();
    let model = adapted(base, lora, placement).unwrap();
    Engine::placed(model, optimizer(), placement.clone()).unwrap()
}

/// Adapters, merged weights and the norms of a run.
fn trained(layout: &Layout, gated: bool, lora: &LoraConfig) -> (Vec<u32>, Vec<u32>, Vec<u64>) {
    let mut all = on_ranks(layout.world, |world| {
        let mut engine = engine(gated, lora, &layout.placement(&world).unwrap());
        let norms = train(&mut engine, layout, 4, 13).unwrap();
        let model = engine.model();
        (
            all_bits(model, |index| model.whole_trained_unit(index)),
            all_bits(model, |index| model.whole_unit(index)),
            norms,
        )
    });
    assert!(all.iter().all(|rank| rank.2 == all[0].2), "{layout:?}: ranks disagree on the gradient's norm");
    all.swap_remove(0)
}

#[test]
fn every_layout_equals_one_rank() {
    for gated in [true, false] {
        for (rounds, recompute) in [(1, Recompute::Off), (2, Recompute::On)] {
            for tensor_lanes in [1, 2] {
                let lora = config(3, 0.2);
                let config = ParallelConfig { data_lanes: 4, tensor_lanes, ..ParallelConfig::default() };
                let alone = Layout { rounds, recompute, ..Layout::of(1, ZeroStage::Zero, config) };
                let expected = trained(&alone, gated, &lora);
                for world in [2, 4] {
                    for stage in STAGES {
                        for (tensor, pipeline) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
                            if tensor > tensor_lanes || tensor * pipeline > world {
                                continue;
                            }
                            let config = ParallelConfig { tensor, pipeline, ..config };
                            let layout = Layout { rounds, recompute, ..Layout::of(world, stage, config) };
                            let found = trained(&layout, gated, &lora);
                            assert_eq!(found.2, expected.2, "{layout:?}: norms differ");
                            assert!(found.0 == expected.0, "{layout:?}: adapters differ");
                            assert!(found.1 == expected.1, "{layout:?}: merged weights differ");
                        }
                    }
                }
            }
        }
    }
}

/// In how many pieces a model is cut changes the order of sums and nothing else: the masks of dropout are the same.
#[test]
fn pieces_change_rounding_only() {
    for gated in [true, false] {
        let run = |tensor_lanes| {
            let config = ParallelConfig { data_lanes: 1, tensor_lanes, ..ParallelConfig::default() };
            trained(&Layout::of(1, ZeroStage::Zero, config), gated, &self::config(3, 0.4))
        };
        let (whole, pieces) = (run(1), run(2));
        for (a, b) in whole.2.iter().zip(&pieces.2).map(|(&a, &b)| (f64::from_bits(a), f64::from_bits(b))) {
            assert!((a - b).abs() < 1e-4 * a, "{a} {b}");
        }
    }
}

/// Only the targets have adapters, and only they move.
#[test]
fn targets_alone_are_trained() {
    let lora = LoraConfig { targets: vec!["q_proj".into(), "down_proj".into()], ..config(2, 0.0) };
    let mut engine = engine(true, &lora, &Placement::solo());
    let layout = Layout::of(1, ZeroStage::Zero, ParallelConfig::default());
    let model = engine.model().clone();
    let before: Vec<_> = (0..=4).map(|index| model.base().whole_unit(index).unwrap().unwrap()).collect();
    train(&mut engine, &layout, 2, 5).unwrap();
    for (index, before) in before.iter().enumerate() {
        let after = model.whole_unit(index).unwrap().unwrap();
        let queries = model.spec().heads * model.spec().head_dim;
        for slot in &before.layout().params {
            let rows = |unit: &tandem_engine::model::unit::UnitBuffer, from: usize, to: usize| {
                let rows = unit.get(slot.name).unwrap().narrow(0, from, to - from).unwrap();
                rows.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let adapted = match slot.name {
                "qkv.weight" => queries,
                "down.weight" => slot.shape[0],
                _ => 0,
            };
            let all = slot.shape[0];
            assert_eq!(rows(&after, adapted, all), rows(before, adapted, all), "{}", slot.name);
            assert!(adapted == 0 || rows(&after, 0, adapted) != rows(before, 0, adapted), "{}", slot.name);
        }
    }
}

/// Gradients and moments are those of the adapters, to the byte; of the base there are none.
#[test]
fn memory_is_that_of_the_adapters() {
    let lora = config(2, 0.0);
    for (world, stage) in [(1, ZeroStage::Zero), (2, ZeroStage::Zero), (2, ZeroStage::One), (2, ZeroStage::Three)] {
        let layout = Layout::of(world, stage, ParallelConfig::default());
        on_ranks(world, |world| {
            let placement = layout.placement(&world).unwrap();
            let engine = engine(true, &lora, &placement);
            let (model, optimizer) = (engine.model(), engine.optimizer());
            let spec = model.spec();
            let (d, kv, f) = (spec.hidden, spec.kv_heads * spec.head_dim, spec.mlp_width);
            // q, k, v, o, gate, up, down.
            let block = 2 * ((d + d) + 2 * (d + kv) + (d + d) + 2 * (d + f) + (f + d));
            assert_eq!(model.trained_parameters(), spec.layers * block);
            let ranks = if stage == ZeroStage::Zero { 1 } else { placement.parallel.data.size() };
            // Slices end at multiples of 1,024 elements.
            let held = if ranks == 1 { block } else { block.div_ceil(1024 * ranks) * 1024 };
            for moments in [optimizer.first_moments(), optimizer.second_moments()] {
                assert_eq!(moments.iter().map(|slice| slice.len()).sum::<usize>(), spec.layers * held);
            }
            let gradients =
                if stage == ZeroStage::One { (ranks * held + held) * spec.layers } else { held * spec.layers };
            let bytes = engine.grads().size_bytes();
            assert!(bytes <= 4 * gradients as u64, "{stage:?}: {bytes} bytes of gradients");
            assert!(model.parameters() > 10 * model.trained_parameters());
        });
    }
}
