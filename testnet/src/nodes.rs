//! The nodes of a network, each with the folder that outlives it: they can be stopped in order, torn down as if the
//! process had been killed, and started again from what is on disk.

use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::{Keypair, PeerAddrs, PeerId};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::line::Line;
use crate::network::NetworkError;

/// For an orderly end.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// What a crash left running in other threads lets go of files and ports within this.
const RESTART_LIMIT: Duration = Duration::from_secs(10);

/// Starts again until what ran before has let go of files and ports.
async fn again<R, E: std::fmt::Display, F: Future<Output = Result<R, E>>>(
    name: &str,
    start: impl Fn() -> F,
) -> Result<R, NetworkError> {
    let end = Instant::now() + RESTART_LIMIT;
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        match Box::pin(start()).await {
            Ok(running) => return Ok(running),
            Err(error) if Instant::now() >= end => {
                return Err(NetworkError::Start { node: name.to_owned(), reason: error.to_string() });
            }
            Err(error) => tracing::debug!(node = name, %error, "not started yet"),
        }
    }
}

fn key_of(name: &str, path: &Path) -> Result<Keypair, NetworkError> {
    node::load_key(path, None).map_err(|e| NetworkError::Init { node: name.to_owned(), reason: e.to_string() })
}

fn stopped(name: &str, result: Result<(), impl std::fmt::Display>) -> Result<(), NetworkError> {
    result.map_err(|error| NetworkError::Stop { node: name.to_owned(), reason: error.to_string() })
}

/// The manager and its origin, which share a process.
pub struct Manager {
    pub(crate) dir: PathBuf,
    pub(crate) running: Option<origin::Running>,
}

impl Manager {
    /// The running pair.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn running(&self) -> Result<&origin::Running, NetworkError> {
        self.running.as_ref().ok_or_else(|| NetworkError::Down("manager".to_owned()))
    }

    /// The origin as a source.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn origin(&self) -> Result<PeerId, NetworkError> {
        Ok(self.running()?.origin().peer_id())
    }

    /// Where it is, as the network's members know it.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn at(&self) -> Result<PeerAddrs, NetworkError> {
        let manager = self.running()?.manager();
        Ok(PeerAddrs::new(manager.peer_id(), manager.addresses()))
    }

    /// The network's own key with this public half, as it lies in the manager's folder: what an adversary who broke into
    /// the manager would have.
    ///
    /// # Errors
    /// [`NetworkError::Init`] when there is none.
    pub fn network_key(&self, public: &PeerId) -> Result<Keypair, NetworkError> {
        for entry in std::fs::read_dir(self.dir.join("keys"))? {
            let key = key_of("manager", &entry?.path())?;
            if key.peer_id() == *public {
                return Ok(key);
            }
        }
        Err(NetworkError::Init { node: "manager".to_owned(), reason: format!("it has no key {public}") })
    }

    /// Answers a control command.
    ///
    /// # Errors
    /// [`NetworkError::Control`], [`NetworkError::Down`].
    pub async fn control(&self, request: Value) -> Result<Value, NetworkError> {
        Ok(Box::pin(self.running()?.manager().control(request)).await?)
    }

    /// Starts it over its folder.
    ///
    /// # Errors
    /// [`NetworkError::Start`].
    pub async fn start(&mut self) -> Result<(), NetworkError> {
        if self.running.is_none() {
            self.running = Some(again("manager", || origin::start(&self.dir)).await?);
        }
        Ok(())
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// [`NetworkError::Stop`] names what did not end.
    pub async fn stop(&mut self) -> Result<(), NetworkError> {
        match self.running.take() {
            Some(running) => stopped("manager", Box::pin(running.stop(STOP_LIMIT)).await),
            None => Ok(()),
        }
    }

    /// Aborts the origin's tasks alone: the manager goes on without it.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub async fn crash_origin(&self) -> Result<(), NetworkError> {
        // Tasks that still run are what a crash is about.
        let _ = self.running()?.origin().supervisor().shutdown(Duration::ZERO).await;
        Ok(())
    }

    /// Aborts all of its tasks where they stand.
    pub async fn crash(&mut self) {
        if let Some(running) = self.running.take() {
            // Tasks that still run are what a crash is about.
            let _ = running.origin().supervisor().shutdown(Duration::ZERO).await;
            let _ = running.manager().supervisor().shutdown(Duration::ZERO).await;
        }
    }
}

/// A merchant.
pub struct Merchant {
    pub(crate) dir: PathBuf,
    pub(crate) config: merchant_node::Config,
    pub(crate) running: Option<merchant_node::Running>,
}

impl Merchant {
    /// The running merchant.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn running(&self) -> Result<&merchant_node::Running, NetworkError> {
        self.running.as_ref().ok_or_else(|| NetworkError::Down("merchant".to_owned()))
    }

    /// Where its shop is.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn url(&self) -> Result<String, NetworkError> {
        Ok(format!("http://{}/", self.running()?.http_address()))
    }

    /// Asks over its control socket, as the command line does.
    ///
    /// # Errors
    /// [`NetworkError::Call`].
    pub async fn control(&self, request: Value) -> Result<Value, NetworkError> {
        control(&self.dir, request).await
    }

    /// Starts it over its folder.
    ///
    /// # Errors
    /// [`NetworkError::Start`].
    pub async fn start(&mut self) -> Result<(), NetworkError> {
        if self.running.is_none() {
            let start = || merchant_node::start(&self.dir, self.config.clone());
            self.running = Some(again("merchant", start).await?);
        }
        Ok(())
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// [`NetworkError::Stop`] names what did not end.
    pub async fn stop(&mut self) -> Result<(), NetworkError> {
        match self.running.take() {
            Some(running) => stopped("merchant", running.stop(STOP_LIMIT).await),
            None => Ok(()),
        }
    }

    /// Aborts all of its tasks where they stand.
    pub async fn crash(&mut self) {
        if let Some(running) = self.running.take() {
            let _ = running.supervisor().shutdown(Duration::ZERO).await;
        }
    }
}

/// A seeder.
pub struct Seeder {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    /// As it is started with; changes count from the next start on.
    pub config: seeder::Config,
    /// What others reach it through, where its link has a speed.
    pub(crate) line: Option<Line>,
    pub(crate) running: Option<seeder::Running>,
    pub(crate) peer: PeerId,
}

impl Seeder {
    /// Its peer ID, also while it is down.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Its key, as it lies in its folder.
    ///
    /// # Errors
    /// [`NetworkError::Init`] when it cannot be read.
    pub fn keypair(&self) -> Result<Keypair, NetworkError> {
        key_of(&self.name, &self.dir.join("key"))
    }

    /// Its link, if it has one of its own.
    pub fn line(&self) -> Option<&Line> {
        self.line.as_ref()
    }

    /// The running seeder.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn running(&self) -> Result<&seeder::Running, NetworkError> {
        self.running.as_ref().ok_or_else(|| NetworkError::Down(self.name.clone()))
    }

    /// It and where it is reached.
    ///
    /// # Errors
    /// [`NetworkError::Down`].
    pub fn at(&self) -> Result<PeerAddrs, NetworkError> {
        Ok(self.running()?.peer_addrs())
    }

    /// A number from its status, such as `bytes_sent`; 0 while it is down.
    pub fn count(&self, name: &str) -> u64 {
        let status = self.running.as_ref().and_then(|running| running.status().ok());
        status.and_then(|status| status.get(name).and_then(Value::as_u64)).unwrap_or(0)
    }

    /// Asks over its control socket, as the command line does.
    ///
    /// # Errors
    /// [`NetworkError::Call`].
    pub async fn control(&self, request: Value) -> Result<Value, NetworkError> {
        control(&self.dir, request).await
    }

    /// Whether it has whole copies of so many contents.
    pub async fn holds(&self, contents: usize) -> bool {
        let status = self.control(json!({"cmd": "status"})).await.unwrap_or_default();
        let lines = status.get("contents").and_then(Value::as_array).cloned().unwrap_or_default();
        lines.iter().filter(|line| line.get("complete") == Some(&Value::Bool(true))).count() >= contents
    }

    /// Starts it over its folder.
    ///
    /// # Errors
    /// [`NetworkError::Start`].
    pub async fn start(&mut self) -> Result<(), NetworkError> {
        if self.running.is_none() {
            let running = again(&self.name, || seeder::start(&self.dir, self.config.clone())).await?;
            if let Some(line) = &self.line {
                line.lead_to(&running.handle().listen_addresses().await?);
                line.mend();
            }
            self.running = Some(running);
        }
        Ok(())
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// [`NetworkError::Stop`] names what did not end.
    pub async fn stop(&mut self) -> Result<(), NetworkError> {
        match self.running.take() {
            Some(running) => stopped(&self.name, running.stop(STOP_LIMIT).await),
            None => Ok(()),
        }
    }

    /// Aborts all of its tasks where they stand.
    pub async fn crash(&mut self) {
        if let Some(running) = self.running.take() {
            let _ = running.supervisor().shutdown(Duration::ZERO).await;
        }
    }
}

async fn control(dir: &Path, request: Value) -> Result<Value, NetworkError> {
    Ok(node::control_call(dir, &request, |_| {}).await?)
}
