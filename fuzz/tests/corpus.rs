//! Replays the corpus: the inputs by which fuzzers reached new code, and those that once broke a promise.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::Path;

use terway_fuzz::TARGETS;

#[test]
fn every_target_keeps_its_promises_on_its_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for file in std::fs::read_dir(corpus.join(name)).unwrap() {
            let path = file.unwrap().path();
            // The last line before a panic names the input.
            println!("{}", path.display());
            target(&std::fs::read(&path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no corpus");
    }
}

#[test]
fn every_folder_of_the_corpus_has_a_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for folder in std::fs::read_dir(corpus).unwrap() {
        let name = folder.unwrap().file_name().into_string().unwrap();
        let known = TARGETS.iter().any(|(target, _)| *target == name);
        let needs_daemon = ["manifest", "openapi_reply", "store_file"].contains(&name.as_str());
        assert!(known || needs_daemon && !cfg!(feature = "daemon"), "{name}");
    }
}
