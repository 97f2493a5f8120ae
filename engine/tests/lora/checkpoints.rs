//! Checkpoints of adapters: what one number of ranks has written, another reads and goes on with.

use tandem_engine::checkpoint::{load_ema, load_lora_engine, save_ema, save_engine};
use tandem_engine::model::unit::Head;
use tandem_engine::parallel::{ParallelConfig, Placement, ZeroStage};
use tandem_engine::train::Ema;
use tandem_engine::{Engine, LoraConfig, Model, Train};
use tandem_store::{Published, RunDir};

use crate::adapted::{adapted, all_bits, config};
use crate::ranks::on_ranks;
use crate::toy::{Layout, optimizer, spec, train};

fn base(placement: &Placement) -> Model {
    Model::initial(spec(true), Head::Language, 7).unwrap().place(placement).unwrap()
}

/// Adapters and their average.
fn state(engine: &Engine<Train>, ema: &Ema) -> [Vec<u32>; 2] {
    let bits = |model: &Model| all_bits(model, |index| model.whole_trained_unit(index));
    [bits(engine.model()), bits(&ema.model(engine.model()).unwrap())]
}

#[test]
fn any_ranks_go_on_with_what_any_have_written() {
    let lora = config(3, 0.1);
    let layout = |world, stage, tensor, pipeline| {
        let config = ParallelConfig { data_lanes: 4, tensor_lanes: 2, tensor, pipeline, ..ParallelConfig::default() };
        Layout::of(world, stage, config)
    };
    let steps = |engine: &mut Engine<Train>, ema: &mut Ema, layout: &Layout, steps: u64| {
        for _ in 0..steps {
            train(engine, layout, 1, 9).unwrap();
            ema.update(engine.model()).unwrap();
        }
    };
    let writers =
        [layout(4, ZeroStage::Three, 2, 1), layout(1, ZeroStage::Zero, 1, 1), layout(4, ZeroStage::One, 1, 2)];
    let readers =
        [layout(1, ZeroStage::Zero, 1, 1), layout(2, ZeroStage::Two, 1, 1), layout(4, ZeroStage::Three, 2, 2)];
    let mut all = Vec::new();
    for writer in &writers {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path()).unwrap();
        let expected = on_ranks(writer.world, |world| {
            let placement = writer.placement(&world).unwrap();
            let model = adapted(base(&placement), &lora, &placement).unwrap();
            let mut ema = Ema::new(&model, 0.9, &placement).unwrap();
            let mut engine = Engine::placed(model, optimizer(), placement).unwrap();
            steps(&mut engine, &mut ema, writer, 2);
            let mut staging = (world.rank() == 0).then(|| run.checkpoints().stage(2).unwrap());
            save_engine(&engine, "actor", staging.as_mut()).unwrap();
            save_ema(&ema, engine.model(), "average", staging.as_mut()).unwrap();
            staging.map(|staging| staging.publish(serde_json::json!({})).unwrap());
            let saved = state(&engine, &ema);
            steps(&mut engine, &mut ema, writer, 2);
            [saved, state(&engine, &ema)]
        });
        let published = run.checkpoints().open(2).unwrap().unwrap();
        for reader in &readers {
            let found = on_ranks(reader.world, |world| {
                let placement = reader.placement(&world).unwrap();
                let mut engine =
                    load_lora_engine(base(&placement), &lora, optimizer(), "actor", &published, &placement).unwrap();
                assert_eq!(engine.optimizer().step(), 2);
                let mut ema = load_ema(engine.model(), 0.9, "average", &published, &placement).unwrap();
                let loaded = state(&engine, &ema);
                steps(&mut engine, &mut ema, reader, 2);
                [loaded, state(&engine, &ema)]
            });
            assert!(found[0] == expected[0], "{writer:?} to {reader:?}");
        }
        refuses_others(&published, &lora);
        all.push(expected.into_iter().next());
    }
    assert!(all.iter().all(|run| *run == all[0]), "writers differ");
}

/// Adapters of another rank or of other maps are not these.
fn refuses_others(published: &Published, lora: &LoraConfig) {
    for other in [LoraConfig { rank: 4, ..lora.clone() }, LoraConfig { targets: vec!["q_proj".into()], ..lora.clone() }]
    {
        let placement = Placement::solo();
        let loaded = load_lora_engine(base(&placement), &other, optimizer(), "actor", published, &placement);
        let error = loaded.unwrap_err().to_string();
        assert!(error.contains("actor.safetensors") && error.contains("block.0"), "{error}");
    }
}
