//! The node daemon; see `terway_daemon::daemon`.

use std::process::ExitCode;

use clap::Parser;
use terway_daemon::options::Options;
use terway_daemon::supervise;
use tracing::error;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = match EnvFilter::try_new(&options.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("terwayd: --log {}: {error}", options.log);
            return ExitCode::from(2);
        }
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if options.log_json {
        log.json().init();
    } else {
        log.with_ansi(false).init();
    }
    supervise::install_panic_hook();
    // One worker: the work is short, and handing it to another thread costs an ADD more than waiting its turn. What takes long has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(terway_daemon::daemon::run(options));
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            outcome
        }
        Err(error) => {
            error!(%error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(
                code = error.code.id,
                cause = error.code.cause,
                detail = error.detail,
                remedy = error.code.remedy,
                "terwayd ends"
            );
            ExitCode::FAILURE
        }
    }
}
