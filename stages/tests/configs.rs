//! Every configuration in `configs/` can be run: it parses, its values lie in their ranges, its files are there, and each
//! stage finds the model that it starts from.

use std::path::{Path, PathBuf};

use tandem_stages::config::{Config, Origin, RuleConfig, Stage};

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
