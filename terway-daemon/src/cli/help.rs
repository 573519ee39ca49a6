//! Tests of the help texts: what a new user reads first.

use clap::{Command, CommandFactory as _};

use super::Cli;

/// Every command with its path, as typed.
fn all(command: &Command, path: &str, found: &mut Vec<(String, Command)>) {
    let path = format!("{path}{}", command.get_name());
    found.push((path.clone(), command.clone()));
    for sub in command.get_subcommands() {
        all(sub, &format!("{path} "), found);
    }
}

#[test]
fn help_describes_the_command_line_and_not_the_daemon() {
    let help = Cli::command().render_long_help().to_string();
    assert!(help.starts_with("Inspects the terway daemon of this node"), "{help}");
    assert!(!help.contains("runs the decisions"), "{help}");
    for word in ["Examples:", "Exit codes:", "terway-cli status"] {
        assert!(help.contains(word), "{word}\n{help}");
    }
    let daemon = crate::options::Options::command().render_long_help().to_string();
    assert!(daemon.starts_with("The node daemon of the terway container network"), "{daemon}");
}

#[test]
fn every_command_argument_and_option_says_what_it_is() {
    let mut commands = Vec::new();
    all(&Cli::command(), "", &mut commands);
    assert!(commands.len() > 20, "{}", commands.len());
    for (path, command) in commands {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        assert!(about.len() > 10, "{path}: {about:?}");
        for argument in command.get_arguments().filter(|argument| argument.get_id() != "help") {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.len() > 5, "{path} {}: {help:?}", argument.get_id());
        }
        assert!(!command.clone().render_help().to_string().is_empty());
    }
}

#[test]
fn examples_are_accepted_by_the_parser() {
    let mut commands = Vec::new();
    all(&Cli::command(), "", &mut commands);
    let mut examples = 0;
    for (path, command) in commands {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in text.lines().filter(|line| line.starts_with("  ")) {
            let Some((_, line)) = line.split_once("terway-cli ") else { continue };
            // An explanation stands behind two spaces.
            let line = line.split("  ").next().unwrap_or_default();
            let words = std::iter::once("terway-cli").chain(line.split_whitespace());
            if let Err(error) = <Cli as clap::Parser>::try_parse_from(words) {
                panic!("{path}: {line}: {error}");
            }
            examples += 1;
        }
    }
    assert!(examples > 10, "{examples}");
}
