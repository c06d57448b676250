//! A node that is killed by the default action of SIGTERM loses what it was doing; waiting for the signal here lets
//! every role stop through its supervisor instead.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that stop a process, heard from the moment this is made.
#[derive(Debug)]
pub struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Begins to hear them: from now on they no longer end the process.
    ///
    /// # Errors
    /// When the signal handlers cannot be installed.
    pub fn install() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for one that came since, and gives its name.
    pub async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// Waits for SIGINT or SIGTERM and gives the name of the one that came.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub async fn wait_for_stop() -> std::io::Result<&'static str> {
    Ok(StopSignals::install()?.wait().await)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn both_signals_are_seen() {
        for (send, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
            let wait = wait_for_stop();
            tokio::pin!(wait);
            // The first poll installs the handlers; until then the signal would end this process.
            assert!(futures::poll!(&mut wait).is_pending());
            kill_process(getpid(), send).unwrap();
            let limit = std::time::Duration::from_secs(10);
            assert_eq!(tokio::time::timeout(limit, wait).await.unwrap().unwrap(), name);
        }
    }
}
