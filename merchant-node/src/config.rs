//! What a merchant is told at its start. Every number that bounds something stands here with its unit, so that tests
//! and demonstrations can shorten what in a real shop takes minutes.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use protocol::Address;
use protocol::trust::{DEFAULT_CLOCK_GRACE_MS, JoinLine};
use serde::{Deserialize, Serialize};

/// File name in the merchant's folder.
pub(crate) const FILE: &str = "config.toml";
/// Longest name of a merchant, bytes: what its certificate holds.
pub(crate) const MAX_NAME: usize = 64;

/// Contents of `config.toml`; keys are in kebab-case. Times are milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// The line that the manager's operator gave out (`willcall-join:…`), with the merchant's invitation.
    pub join: String,
    /// The shop's name in its certificate, 1 to 64 bytes.
    pub name: String,
    /// Where to listen for other nodes; port 0 is chosen once and kept. Default: nowhere, because a merchant only calls.
    pub listen: Vec<Address>,
    /// Addresses to announce in place of the ones listened on. Default: none.
    pub external: Vec<Address>,
    /// Where the HTTP API is served; port 0 is chosen once and kept. Default `127.0.0.1:4680`. Put a reverse proxy with
    /// TLS before it when others than this machine are to reach it.
    pub http: SocketAddr,
    /// Loopback address for `/metrics` and `/health`. Default: not served.
    pub metrics: Option<SocketAddr>,
    /// How far clocks may differ, both ways. Default 600,000 (ten minutes).
    pub clock_grace_ms: u64,
    /// Start although `SSLKEYLOGFILE` is set. Default false.
    pub allow_key_log: bool,
    /// Purchases being worked on at once; further ones are answered with 429. Default 64: each waits for two calls to
    /// the manager and half a dozen disk flushes that they share.
    pub purchases_at_once: usize,
    /// HTTP connections at once; further ones wait in the listener's backlog. Default 512.
    pub http_connections: usize,
    /// A purchase is answered with 202 when it is not released by then. Default 15,000.
    pub answer_ms: u64,
    /// Longest wait for one answer of the manager. Default 10,000.
    pub call_ms: u64,
    /// How often keys and catalogue are fetched again. Default 60,000.
    pub refresh_ms: u64,
    /// First and shortest wait after a failed call. Default 1,000.
    pub retry_min_ms: u64,
    /// Longest wait after failed calls. Default 60,000.
    pub retry_max_ms: u64,
    /// How often unfinished orders are looked at. Default 5,000.
    pub orders_ms: u64,
    /// How often the manager is asked about deliveries whose payment waits for completion. Default 30,000.
    pub status_ms: u64,
    /// An order that could not be reserved for this long (manager away) expires and its money is let go. Default
    /// 86,400,000 (a day).
    pub pending_ms: u64,
    /// Unfinished orders; further purchases are answered with 503. Default 10,000: each is polled.
    pub max_open_orders: u64,
    /// Orders kept in all; further purchases are answered with 503. Default 10,000,000, about 10 GiB.
    pub max_orders: u64,
    /// Orders that came to nothing are forgotten, and idempotency keys freed, after this long. Default 2,592,000,000
    /// (30 days).
    pub keep_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            join: String::new(),
            name: String::new(),
            listen: Vec::new(),
            external: Vec::new(),
            http: SocketAddr::from((Ipv4Addr::LOCALHOST, 4680)),
            metrics: None,
            clock_grace_ms: DEFAULT_CLOCK_GRACE_MS,
            allow_key_log: false,
            purchases_at_once: 64,
            http_connections: 512,
            answer_ms: 15_000,
            call_ms: 10_000,
            refresh_ms: 60_000,
            retry_min_ms: 1_000,
            retry_max_ms: 60_000,
            orders_ms: 5_000,
            status_ms: 30_000,
            pending_ms: 24 * 60 * 60 * 1000,
            max_open_orders: 10_000,
            max_orders: 10_000_000,
            keep_ms: 30 * 24 * 60 * 60 * 1000,
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The folder holds no merchant.
    #[error("{} does not exist; make a merchant there first with `willcall merchant init`, or choose another --dir", path.display())]
    Missing {
        /// The file looked for.
        path: PathBuf,
    },
    /// The system does not let us.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a value of another type; the message names line and key.
    #[error("{}: {message}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line, key and what is wrong.
        message: String,
    },
    /// A value that cannot be.
    #[error("{key} in config.toml: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with it, and what to do.
        reason: String,
    },
}

impl Config {
    /// The default configuration of a merchant of this name.
    pub fn new(join: &JoinLine, name: impl Into<String>) -> Self {
        Config { join: join.to_string(), name: name.into(), ..Config::default() }
    }

    /// Reads `<dir>/config.toml`.
    ///
    /// # Errors
    /// [`ConfigError`] names file and key and says what to do.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ConfigError::Missing { path: path.clone() },
            _ => ConfigError::Io { path: path.clone(), source },
        })?;
        let config: Config = toml::from_str(&text)
            .map_err(|e| ConfigError::Toml { path, message: node::at_line(&text, e.span(), e.message()) })?;
        config.check()?;
        Ok(config)
    }

    /// The join line, parsed.
    ///
    /// # Errors
    /// [`ConfigError::Value`] when it is none.
    pub fn join_line(&self) -> Result<JoinLine, ConfigError> {
        self.join.parse().map_err(|error| ConfigError::Value { key: "join", reason: format!("{error}") })
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError::Value`] names the first key that cannot be used.
    pub fn check(&self) -> Result<(), ConfigError> {
        let value = |key, reason: &str| Err(ConfigError::Value { key, reason: reason.to_owned() });
        if self.join.is_empty() {
            return value("join", "it is missing; put there the line that `willcall manager invite merchant` prints");
        }
        self.join_line()?;
        if self.name.is_empty() || self.name.len() > MAX_NAME || self.name.chars().any(char::is_control) {
            return value("name", "1 to 64 bytes without control characters are expected");
        }
        if self.metrics.is_some_and(|address| !address.ip().is_loopback()) {
            return value("metrics", "only a loopback address such as 127.0.0.1:9000 can be used");
        }
        let at_least_one = [
            ("purchases-at-once", self.purchases_at_once as u64),
            ("http-connections", self.http_connections as u64),
            ("answer-ms", self.answer_ms),
            ("call-ms", self.call_ms),
            ("refresh-ms", self.refresh_ms),
            ("retry-min-ms", self.retry_min_ms),
            ("retry-max-ms", self.retry_max_ms),
            ("orders-ms", self.orders_ms),
            ("status-ms", self.status_ms),
            ("max-open-orders", self.max_open_orders),
            ("max-orders", self.max_orders),
            ("keep-ms", self.keep_ms),
        ];
        match at_least_one.into_iter().find(|(_, n)| *n == 0) {
            Some((key, _)) => value(key, "it must be at least 1; remove the line for the default"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn errors_name_file_line_and_key() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Config::load(dir.path()).unwrap_err().to_string().contains("merchant init"));
        std::fs::write(dir.path().join(FILE), "name = \"shop\"\nprot = 1\n").unwrap();
        let error = Config::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("prot"), "{error}");
        std::fs::write(dir.path().join(FILE), "name = \"shop\"\njoin = \"x\"\n").unwrap();
        let error = Config::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("join in config.toml"), "{error}");
        let root = protocol::Keypair::from_seed(&[1; 32]).peer_id();
        let join = JoinLine { root, managers: vec![root.into()], invitation: None };
        for key in ["max-open-orders", "max-orders", "keep-ms", "call-ms"] {
            let text = toml::to_string(&Config::new(&join, "shop")).unwrap();
            let line = text.lines().find(|line| line.starts_with(&format!("{key} = "))).unwrap();
            std::fs::write(dir.path().join(FILE), text.replace(line, &format!("{key} = 0"))).unwrap();
            let error = Config::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("{key} in config.toml: it must be at least 1; ")), "{error}");
        }
    }
}
