//! What an operator can set, as plain data: every key with its unit and default, and unknown keys refused, because a
//! misspelt key that is passed over is a setting that silently is not set.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{fs, io};

use protocol::{Address, Currency};
use serde::{Deserialize, Serialize};

const MINUTE: u64 = 60 * 1000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Most gossip topics that receipts can be spread over: the network host takes part in at most 512 topics.
pub(crate) const MAX_SHARDS: u16 = 256;

/// `<dir>/config.toml` of a manager. Times are milliseconds unless a key says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Addresses to listen on. Default: TCP and QUIC on port 4601 of every interface. Port 0: chosen by the system at
    /// the first start and kept.
    pub listen: Vec<Address>,
    /// Addresses to tell others, where they differ from those listened on. Default: none.
    pub external: Vec<Address>,
    /// Serves metrics and health on this loopback address. Default: not at all.
    pub metrics: Option<SocketAddr>,
    /// How far clocks may differ. Default: 600000 (10 minutes).
    pub clock_grace_ms: u64,
    /// Starts although SSLKEYLOGFILE is set. Default: false.
    pub allow_key_log: bool,

    /// Between two heartbeats. Default: 300000 (5 minutes).
    pub heartbeat_ms: u64,
    /// A gossip message is remembered for so long, so that it is not forwarded twice; the same at all nodes. Default: 300000
    /// (5 minutes).
    pub gossip_memory_ms: u64,
    /// Between two looks at which content has too few copies. Default: 30000.
    pub placement_ms: u64,
    /// Copies of each content besides the origin's. Default: 3.
    pub copies: u32,
    /// A content for which so many leases were signed within `demand-ms` has one more copy, for twice as many two more; 0
    /// for no more. Where most of its seeders turn clients away it has one more, too. Default: 50.
    pub demand_per_copy: u32,
    /// The time that counts as demand. Default: 3600000 (1 hour).
    pub demand_ms: u64,
    /// Copies of each content at most, however much it is asked for. Default: 24.
    pub max_copies: u32,
    /// About so often a seeder, drawn by lot, is looked at: the manager fetches from it like a client and checks what comes.
    /// 0 for only after complaints. Default: 600000 (10 minutes).
    pub audit_ms: u64,
    /// Between two looks at one seeder, however many complain of it. Default: 60000.
    pub audit_pause_ms: u64,
    /// A seeder that has not reported for so long is not named as a source. Default: 180000 (3 minutes; seeders report every 30 s).
    pub seeder_away_ms: u64,
    /// A seeder that has not reported for so long is counted as lost, and its copies are made elsewhere. Default:
    /// 3600000 (1 hour).
    pub seeder_lost_ms: u64,
    /// How long a replication order is good; it is renewed while it is not fulfilled. Default: 86400000 (1 day).
    pub order_ms: u64,
    /// The origin's directory, relative to the manager's. Default: `origin`.
    pub origin_dir: PathBuf,
    /// How long a publication waits for the origin to report that it holds it. Default: 15000.
    pub origin_wait_ms: u64,

    /// Currency of what deliveries and replications cost. Default: USD.
    pub currency: Currency,
    /// What seeders earn where a publication does not say otherwise: millionths of the minor unit per MiB. Default:
    /// 1000 (about one cent per GiB).
    pub rate: u64,
    /// The network's fee: millionths of the price. Default: 0.
    pub fee_millionths: u32,
    /// Room in a delivery's ceiling for chunks that are fetched twice: millionths of its plain cost. Default: 100000.
    pub ceiling_slack_millionths: u32,
    /// A reservation that was not released by then expires. Default: 900000 (15 minutes).
    pub reservation_ms: u64,
    /// Reservations of one merchant that are open, or were cancelled before their time was over; further ones are refused.
    /// Default: 1000.
    pub max_reservations: u32,
    /// What a merchant may come to owe for deliveries, minor units of the sale's currency: the ceilings of those under way and
    /// what was charged for those before, less what it paid. Releases beyond it are refused. Prices that it collected, and
    /// what of them is due, do not count. Default: 10000000.
    pub credit_limit: u64,
    /// After a lease's end, or a refund before it, so much longer receipts and completions are waited for. Default:
    /// 172800000 (48 hours).
    pub close_grace_ms: u64,
    /// Between two looks at what has expired or is to be closed. Default: 5000.
    pub sales_ms: u64,
    /// An ended transaction moves out of the database after so much rest, and stays at hand. Default: 604800000 (7 days).
    pub archive_ms: u64,
    /// Period of a seeder's statements of account. Default: 86400000 (1 day).
    pub statement_ms: u64,

    /// How long a lease is good where a publication does not say otherwise. Default: 604800000 (7 days).
    pub lease_ms: u64,
    /// How long an invitation is good. Default: 604800000 (7 days).
    pub invitation_ms: u64,
    /// How long a certificate is good. Default: 31536000000 (365 days).
    pub certificate_ms: u64,

    /// Finds nodes on the local network by multicast (mDNS), and is found. Default: false.
    pub lan: bool,
    /// Relays connections to seeders that nobody can dial: `enabled` (false), `slots` (128), `circuits` (64),
    /// `circuit-bytes` (131072), `circuit-ms` (120000).
    pub relay: node::RelayConfig,
}

impl Default for Config {
    fn default() -> Self {
        let listen = ["/ip4/0.0.0.0/tcp/4601", "/ip4/0.0.0.0/udp/4601/quic-v1"];
        Config {
            listen: listen.iter().filter_map(|text| Address::new(text).ok()).collect(),
            external: Vec::new(),
            metrics: None,
            clock_grace_ms: protocol::trust::DEFAULT_CLOCK_GRACE_MS,
            allow_key_log: false,
            heartbeat_ms: 5 * MINUTE,
            gossip_memory_ms: 5 * MINUTE,
            placement_ms: MINUTE / 2,
            copies: 3,
            demand_per_copy: 50,
            demand_ms: HOUR,
            max_copies: 24,
            audit_ms: 10 * MINUTE,
            audit_pause_ms: MINUTE,
            seeder_away_ms: 3 * MINUTE,
            seeder_lost_ms: HOUR,
            order_ms: DAY,
            origin_dir: PathBuf::from("origin"),
            origin_wait_ms: 15_000,
            currency: Currency::USD,
            rate: 1000,
            fee_millionths: 0,
            ceiling_slack_millionths: 100_000,
            reservation_ms: 15 * MINUTE,
            max_reservations: 1000,
            credit_limit: 10_000_000,
            close_grace_ms: 48 * HOUR,
            sales_ms: 5000,
            archive_ms: 7 * DAY,
            statement_ms: DAY,
            lease_ms: 7 * DAY,
            invitation_ms: 7 * DAY,
            certificate_ms: 365 * DAY,
            lan: false,
            relay: node::RelayConfig::default(),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such file: the directory was not set up.
    #[error("{} does not exist; set the directory up with: willcall manager init --dir {}", path.display(), dir.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The directory.
        dir: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It is no configuration.
    #[error("{}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, key and what is expected there.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{}: {key} {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
}

impl Config {
    /// Reads `<dir>/config.toml`.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file and the key or line.
    pub fn load(dir: &Path) -> Result<Config, ConfigError> {
        let path = config_path(dir);
        let text = fs::read_to_string(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ConfigError::Missing { path: path.clone(), dir: dir.to_owned() },
            _ => ConfigError::Io { path: path.clone(), source },
        })?;
        Self::parse(&path, &text)
    }

    pub(crate) fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)
            .map_err(|e| node::at_line(text, e.span(), e.message()))
            .map_err(|reason| ConfigError::Syntax { path: path.to_owned(), reason })?;
        config.check().map_err(|(key, reason)| ConfigError::Value {
            path: path.to_owned(),
            key,
            reason: reason.to_owned(),
        })?;
        Ok(config)
    }

    pub(crate) fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let positive = [
            ("heartbeat-ms", self.heartbeat_ms),
            ("gossip-memory-ms", self.gossip_memory_ms),
            ("placement-ms", self.placement_ms),
            ("seeder-away-ms", self.seeder_away_ms),
            ("seeder-lost-ms", self.seeder_lost_ms),
            ("order-ms", self.order_ms),
            ("demand-ms", self.demand_ms),
            ("reservation-ms", self.reservation_ms),
            ("sales-ms", self.sales_ms),
            ("statement-ms", self.statement_ms),
            ("lease-ms", self.lease_ms),
            ("invitation-ms", self.invitation_ms),
            ("certificate-ms", self.certificate_ms),
            ("max-reservations", u64::from(self.max_reservations)),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err((key, "must not be 0: give at least 1, or remove the line for the default"));
        }
        self.relay.check()?;
        if self.fee_millionths > 1_000_000 {
            return Err(("fee-millionths", "is at most 1000000, the whole price"));
        }
        if self.listen.is_empty() {
            return Err(("listen", "names no address; give one such as \"/ip4/0.0.0.0/tcp/4601\""));
        }
        if self.copies > 1000 || self.max_copies > 1000 {
            return Err(("copies", "and max-copies are at most 1000"));
        }
        Ok(())
    }

    /// The origin's directory for a manager at `dir`.
    pub fn origin_path(&self, dir: &Path) -> PathBuf {
        dir.join(&self.origin_dir)
    }
}

pub(crate) fn config_path(dir: &Path) -> PathBuf {
    dir.join("config.toml")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_unknown_keys_are_named() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert!(text.contains("heartbeat-ms"), "{text}");
        assert_eq!(Config::parse(Path::new("c"), &text).unwrap(), Config::default());
        assert_eq!(Config::parse(Path::new("c"), "").unwrap(), Config::default());

        let error =
            Config::parse(Path::new("dir/config.toml"), "copies = 2\nhartbeat-ms = 3\n").unwrap_err().to_string();
        assert!(error.contains("dir/config.toml") && error.contains("hartbeat-ms") && error.contains('2'), "{error}");
        let error = Config::parse(Path::new("c"), "lease-ms = 0").unwrap_err().to_string();
        assert!(error.contains("lease-ms must not be 0"), "{error}");
        let error = Config::parse(Path::new("c"), "max-reservations = 0").unwrap_err().to_string();
        assert!(error.contains("max-reservations must not be 0: give at least 1"), "{error}");
        assert!(Config::parse(Path::new("c"), "listen = [\"127.0.0.1:3\"]").is_err());
    }
}
