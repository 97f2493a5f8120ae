//! Bad configurations: each is refused with the file, the full path of the key, and the remedy.

use std::path::Path;

use tandem_engine::WeightFormat;
use tandem_engine::train::ScheduleKind;
use tandem_stages::config::{Config, ConfigError, Origin, SftLoss, Stage};
use tandem_stages::error::StageError;

const MINIMAL: &str = r#"
    [model]
    path = "some/model"
    [[data.sources]]
    path = "rows.jsonl"
    [ppo.reward]
    rules = [{ kind = "regex", pattern = "good" }]
"#;

fn origin() -> Origin {
    Origin::File("configs/test.toml".into())
}

fn parse_with(text: &str, overrides: &[&str]) -> Result<Config, ConfigError> {
    let overrides: Vec<String> = overrides.iter().map(|&argument| argument.to_owned()).collect();
    let config = Config::parse(text, &origin(), &overrides)?;
    config.check(&Stage::ALL, &origin())?;
    Ok(config)
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    parse_with(text, &[])
}

/// The message must hold all of `parts`.
fn refuses(text: &str, overrides: &[&str], parts: &[&str]) {
    let message = parse_with(text, overrides).expect_err(text).to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

#[test]
fn little_is_needed() {
    let config = parse(MINIMAL).unwrap();
    assert_eq!(config.model.path.as_deref(), Some("some/model"));
    assert_eq!(config.sft.loss, SftLoss::Responses);
    assert_eq!(config.sft.optimizer.schedule, ScheduleKind::Cosine);
}

#[test]
fn every_value_can_be_written_and_read_back() {
    let config = parse_with(MINIMAL, &["ppo.ema_decay=0.99", "ppo.max_approx_kl=0.1", "ppo.kl.target=6"]).unwrap();
    assert_eq!(config.ppo.kl.target, Some(6.0), "whole numbers are numbers");
    let written = toml::to_string(&config).unwrap();
    assert_eq!(parse(&written).unwrap(), config);
}

#[test]
fn overrides_win_and_need_no_quotes() {
    let overrides =
        ["ppo.iterations=5", "sft.optimizer.schedule=linear", "data.split=1,1,1", "data.sources.0.path=b.json"];
    let config = parse_with(MINIMAL, &overrides).unwrap();
    assert_eq!(config.ppo.iterations, 5);
    assert_eq!(config.sft.optimizer.schedule, ScheduleKind::Linear);
    assert_eq!(config.data.shares(), Some([1, 1, 1]));
    assert_eq!(config.data.sources[0].path, Path::new("b.json"));
}

#[test]
fn unknown_keys_name_the_nearest() {
    let cases = [
        ("[ppo]\nitertions = 5", "`ppo.itertions`", "`ppo.iterations`"),
        ("[sft.optimizer]\nlearning-rate = 1", "`sft.optimizer.learning-rate`", "`sft.optimizer.learning_rate`"),
        ("[pppo]\niterations = 5", "`pppo`", "`ppo`"),
        (
            "[[data.sources]]\npath = 'a'\nfields = { promt = 'q' }",
            "`data.sources[0].fields.promt`",
            "`data.sources[0].fields.prompt`",
        ),
        ("[[eval.judge]]\nkind = 'regex'\npatern = 'a'", "`eval.judge[0].patern`", "`eval.judge[0].pattern`"),
    ];
    for (text, key, nearest) in cases {
        refuses(text, &[], &["configs/test.toml", "unknown key", key, &format!("did you mean {nearest}?")]);
    }
    refuses("[run]\nzzz = 1", &[], &["`run.zzz`", "known keys here: seed, precision, threads, output_dir"]);
}

#[test]
fn wrong_types_and_values_name_the_key() {
    let cases: [(&str, &[&str]); 10] = [
        ("[run]\nseed = 'one'", &["`run.seed`", "expected a whole number, 0 or more", "\"one\""]),
        ("[run]\nseed = -1", &["`run.seed`", "`-1`"]),
        ("[run]\nseed = 9223372036854775808", &["not valid TOML"]),
        ("[run]\nthreads = 1.5", &["`run.threads`", "1.5"]),
        ("[sft]\nrecompute = 1", &["`sft.recompute`", "true or false"]),
        ("[sft.optimizer]\nschedule = 'cosin'", &["`sft.optimizer.schedule`", "did you mean `cosine`?", "\"linear\""]),
        ("[sft.optimizer]\nschedule = 3", &["`sft.optimizer.schedule`", "\"linear\""]),
        ("[data]\nsources = 'a'", &["`data.sources`", "a list"]),
        ("[[data.sources]]\nweight = 1", &["`data.sources[0]`", "`path` is required"]),
        ("sft = 3", &["`sft`", "a table"]),
    ];
    for (text, parts) in cases {
        refuses(text, &[], parts);
    }
}

#[test]
fn problems_of_an_override_name_the_override() {
    refuses(MINIMAL, &["ppo.itertions=5"], &["--set ppo.itertions=5", "did you mean `ppo.iterations`?"]);
    refuses(MINIMAL, &["run.seed=many"], &["--set run.seed=many", "`run.seed`"]);
    refuses(MINIMAL, &["run.seed"], &["--set run.seed", "no `=`", "--set ppo.iterations=5"]);
    refuses(MINIMAL, &["data.sources.3.path=x"], &["--set data.sources.3.path=x", "list of 1"]);
}

#[test]
fn values_outside_their_range_are_all_reported_at_once() {
    let cases = [
        ("run.threads", "0"),
        ("data.split", "\"2,4\""),
        ("data.split", "\"0,0,0\""),
        ("data.split", "\"1,0,1\""),
        ("data.eval_fraction", "1"),
        ("data.eval_fraction", "nan"),
        ("data.max_tokens", "1"),
        ("sft.epochs", "0"),
        ("sft.max_steps", "0"),
        ("sft.sequences_per_step", "0"),
        ("sft.tokens_per_micro_batch", "10"),
        ("sft.dropout", "1.0"),
        ("sft.keep_last", "1"),
        ("sft.optimizer.learning_rate", "0"),
        ("sft.optimizer.learning_rate", "inf"),
        ("sft.optimizer.beta2", "1"),
        ("sft.optimizer.warmup_fraction", "-0.1"),
        ("reward.centring", "-1"),
        ("reward.pairs.per_text", "0"),
        ("reward.keep_last", "0"),
        ("ppo.iterations", "0"),
        ("ppo.mini_batches", "65"),
        ("ppo.tokens_per_micro_batch", "511"),
        ("ppo.sampling.temperature", "0"),
        ("ppo.sampling.top_p", "0"),
        ("ppo.gamma", "1.1"),
        ("ppo.lambda", "-0.1"),
        ("ppo.policy_clip", "0"),
        ("ppo.kl.coefficient", "nan"),
        ("ppo.kl.target", "0"),
        ("ppo.ema_decay", "1"),
        ("ppo.reward.clip", "-1"),
        ("ppo.actor_optimizer.clip_norm", "-1"),
        ("generation.max_new_tokens", "0"),
        ("export.max_shard_mib", "0"),
    ];
    for (key, value) in cases {
        let error = parse_with(MINIMAL, &[&format!("{key}={value}")]).expect_err(key);
        let ConfigError::Invalid { problems, .. } = error else { panic!("{key}={value}: {error}") };
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains(&format!("`{key}`")), "{problems:?}");
    }
    let overrides = ["sft.epochs=0", "ppo.gamma=2", "run.threads=0"];
    refuses(MINIMAL, &overrides, &["3 problems", "`sft.epochs`", "`ppo.gamma`", "`run.threads`"]);
}

#[test]
fn contradictions_are_refused() {
    refuses(MINIMAL, &["model.new.layers=2"], &["`model`", "more than one"]);
    refuses("[[data.sources]]\npath = 'a'", &["ppo.reward.model=r"], &["`model`", "none is given"]);
    refuses(MINIMAL, &["tokenizer.train.vocab_size=500"], &["`tokenizer.train`"]);
    refuses(MINIMAL, &["ppo.reward.model=r"], &["`ppo.reward`", "keep one"]);
    refuses(MINIMAL, &["ppo.reward.rules.0.pattern='('"], &["`ppo.reward.rules[0].pattern`", "regular expression"]);
    refuses(MINIMAL, &["eval.judge=[{ kind = 'lexicon' }]"], &["`eval.judge[0]`", "`path`"]);
    refuses(MINIMAL, &["data.sources.0.stages=['sft']"], &["`data.sources`", "reward"]);
    refuses("[model]\npath = 'm'", &[], &["`data.sources`", "at least one"]);
    let new = "[model.new]\nhidden = 30\nheads = 4\n[[data.sources]]\npath = 'a'\n[tokenizer.train]";
    refuses(new, &[], &["`model.new.heads`", "divide"]);
    refuses(new, &["model.new.hidden=32", "model.new.kv_heads=3"], &["`model.new.kv_heads`"]);
    refuses(new, &["model.new.hidden=12"], &["`model.new.head_width`", "even"]);
    refuses(new, &["model.new.hidden=9223372036854775807"], &["`model.new.hidden`"]);
}

#[test]
fn only_the_stages_that_run_are_checked() {
    let config = Config::parse(MINIMAL, &origin(), &["ppo.iterations=0".into()]).unwrap();
    config.check(&[Stage::Sft, Stage::Reward], &origin()).unwrap();
    config.check(&[Stage::Ppo], &origin()).unwrap_err();
}

#[test]
fn files_that_are_no_configurations() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("quickstart.toml");
    std::fs::write(&path, MINIMAL).unwrap();
    Config::load(&path, &[]).unwrap();
    let message = |path: &Path| Config::load(path, &[]).unwrap_err().to_string();
    let missing = message(&dir.path().join("quickstar.toml"));
    assert!(missing.contains("quickstar.toml") && missing.contains("did you mean"), "{missing}");
    assert!(message(dir.path()).contains("not a file"));
    std::fs::write(&path, "[run\nseed = 1").unwrap();
    let syntax = message(&path);
    assert!(syntax.contains("quickstart.toml") && syntax.contains("line 1"), "{syntax}");
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(message(&path).contains("UTF-8"));
    std::fs::write(&path, "# ".repeat(1 << 20)).unwrap();
    assert!(message(&path).contains("larger"));
    let deep = format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    std::fs::write(&path, deep).unwrap();
    assert!(message(&path).contains("not valid TOML"));
}

#[test]
fn a_bad_configuration_is_exit_code_2() {
    let error: StageError = parse("[nothing]").unwrap_err().into();
    assert_eq!(error.exit_code() as u8, 2);
}

#[test]
fn sharing_work_has_its_own_checks() {
    for (key, value) in [
        ("parallel.tensor", "0"),
        ("parallel.pipeline", "0"),
        ("parallel.timeout_s", "0"),
        ("parallel.timeout_s", "inf"),
        ("parallel.reduce_bucket_mib", "0"),
        ("actor.zero_stage", "4"),
        ("reward_model.zero_stage", "9"),
        ("critic.offload_dir", "somewhere"),
        ("lora.alpha", "0"),
        ("lora.dropout", "1"),
        ("lora.learning_rate", "0"),
        ("lora.adapter", "some/adapter"),
        ("ppo.inference_tp_size", "0"),
        ("ppo.tp_gather_partition_size", "0"),
        ("ppo.max_out_tokens", "511"),
        ("sft.optimizer.freeze_steps", "10"),
        ("reward.optimizer.max_local_steps", "0"),
    ] {
        let error = parse_with(MINIMAL, &[&format!("{key}={value}")]).expect_err(key);
        let ConfigError::Invalid { problems, .. } = error else { panic!("{key}={value}: {error}") };
        assert_eq!(problems.len(), 1, "{key}: {problems:?}");
        assert!(problems[0].contains(&format!("`{key}`")), "{problems:?}");
    }
    refuses(MINIMAL, &["lora.rank=4", "lora.targets=['q_proj', 'q_proj']"], &["`lora.targets[1]`", "once more"]);
    refuses(MINIMAL, &["parallel.tensor=2", "parallel.tensor_lanes=3"], &["`parallel.tensor_lanes`", "is 3", "= 2"]);
    refuses("[actor]\nzero_stge = 1", &[], &["`actor.zero_stge`", "did you mean `actor.zero_stage`?"]);
    refuses("[actor]\noffload = 'al'", &[], &["`actor.offload`", "\"optimizer\"", "did you mean `all`?"]);
    refuses("[sft.optimizer]\nkind = 'adam'", &[], &["`sft.optimizer.kind`", "did you mean `adamw`?"]);
    parse_with(MINIMAL, &["lora.rank=4", "lora.adapter=some/adapter", "ppo.max_out_tokens=512"]).unwrap();
}

#[test]
fn compressed_gradients_are_those_of_whole_models() {
    let kind = "ppo.actor_optimizer.kind=one_bit_adam";
    parse_with(MINIMAL, &[kind, "actor.zero_stage=1", "critic.zero_stage=3"]).unwrap();
    let parts = ["`ppo.actor_optimizer.kind`", "\"one_bit_adam\"", "actor.zero_stage", "not 2"];
    refuses(MINIMAL, &[kind, "actor.zero_stage=2"], &parts);
    let parts = ["`reward.optimizer.kind`", "parallel.tensor = 1", "not 1 and 2"];
    refuses(MINIMAL, &["reward.optimizer.kind=sign_sgd", "parallel.pipeline=2"], &parts);
    // The stage with that optimizer is not run.
    let overrides = [kind.to_owned(), "actor.zero_stage=3".to_owned()];
    let config = Config::parse(MINIMAL, &origin(), &overrides).unwrap();
    config.check(&[Stage::Sft], &origin()).unwrap();
}

#[test]
fn weights_of_8_bits_are_asked_not_trained() {
    let bf16 = "run.precision=bf16";
    let model = "[model]\npath = 'm'\n[[data.sources]]\npath = 'a'\n[ppo.reward]\nmodel = 'r'";
    let all = [bf16, "reference.weights=int8", "reward_model.weights=int8", "ppo.rollout_weights=int8"];
    let config = parse_with(model, &all).unwrap();
    assert_eq!(config.reference.weights, WeightFormat::Int8);
    assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
    assert_eq!(parse(model).unwrap().ppo.rollout_weights, WeightFormat::Precision);

    for key in ["reference.weights", "reward_model.weights", "ppo.rollout_weights"] {
        let int8 = format!("{key}=int8");
        refuses(model, &[&int8], &[&format!("`{key}`"), "`run.precision` to \"bf16\""]);
        let other = format!("{key}=int4");
        refuses(model, &[&other], &[&format!("`{key}`"), "\"precision\"", "\"int8\""]);
    }
    refuses(model, &[bf16, "actor.weights=int8"], &["`actor.weights`", "trains", "`ppo.rollout_weights`"]);
    refuses(model, &[bf16, "critic.weights=int8"], &["`critic.weights`", "trains"]);
    refuses(model, &[bf16, all[1], "reference.zero_stage=3"], &["`reference.weights`", "`reference.zero_stage` to 0"]);
    refuses(model, &[bf16, all[1], "lora.rank=4"], &["`reference.weights`", "the actor's own base"]);
    refuses(MINIMAL, &[bf16, all[2]], &["`reward_model.weights`", "no reward model"]);
    refuses(model, &[bf16, all[3], "ppo.pin_parameters=true"], &["`ppo.pin_parameters`", "`ppo.rollout_weights`"]);
    // The stages that train these models do not ask them.
    let overrides = [bf16, all[2]].map(str::to_owned);
    let config = Config::parse(MINIMAL, &origin(), &overrides).unwrap();
    config.check(&[Stage::Sft, Stage::Reward], &origin()).unwrap();
}
