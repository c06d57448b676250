//! What an operator can set, as plain data: every key with its unit and default, and unknown keys refused, because a
//! misspelt key that is passed over is a setting that silently is not set.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{fs, io};

use protocol::trust::{InvitedRole, JoinLine};
use protocol::{Address, ContentId};
use serde::{Deserialize, Serialize};

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const MIB: u64 = 1024 * 1024;

/// `<dir>/config.toml` of a seeder. Times are milliseconds; sizes are bytes, or texts such as
/// `"500GB"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// The line with which to join the network, `willcall-join:…`, with an invitation for a seeder. No default.
    pub join: String,
    /// A name for people, at most 64 bytes. Default: `seeder`.
    pub name: String,
    /// Bytes of content that the network may place here. Default: 10737418240 (10 GiB).
    #[serde(deserialize_with = "node::units::size")]
    pub capacity: u64,
    /// Files and folders that content may take, six for each; 0 for no limit but the disk's. Default: 0.
    pub max_inodes: u64,
    /// Above so many percent of capacity or `max-inodes`, content that is not needed here is removed … Default: 95.
    pub high_water_percent: u32,
    /// … until so many percent are left. Default: 80.
    pub low_water_percent: u32,
    /// Between two looks whether something has to be removed. Default: 60000.
    pub gc_ms: u64,
    /// Where content lies, relative to the seeder's directory. Default: `content`.
    pub content_dir: PathBuf,
    /// Bytes left free on that disk whatever the capacity. Default: 268435456 (256 MiB).
    #[serde(deserialize_with = "node::units::size")]
    pub min_free: u64,
    /// Files and folders left free on that disk whatever `max-inodes`. Default: 1024.
    pub min_free_inodes: u64,
    /// Addresses to listen on. Default: TCP and QUIC on every interface, on ports chosen by the system at the first
    /// start and kept.
    pub listen: Vec<Address>,
    /// Addresses to tell others, where they differ from those listened on. Default: none.
    pub external: Vec<Address>,
    /// Serves metrics and health on this loopback address. Default: not at all.
    pub metrics: Option<SocketAddr>,
    /// How far clocks may differ. Default: 600000 (10 minutes).
    pub clock_grace_ms: u64,
    /// Starts although SSLKEYLOGFILE is set. Default: false.
    pub allow_key_log: bool,

    /// Deliveries at once; further clients are told to come back. Default: 256.
    pub max_deliveries: u32,
    /// Deliveries at once to one peer; further ones are told to come back. Default: 8.
    pub max_deliveries_per_peer: u32,
    /// Memory for chunks that are being sent, one of each delivery, and over QUIC for what is on its way; clients for whom
    /// there is none are told to come back. Default: 268435456 (256 MiB), enough for 256 deliveries of 1 MiB chunks.
    #[serde(deserialize_with = "node::units::size")]
    pub serve_memory: u64,
    /// Memory that deliveries share for chunks read ahead of their time. Default: 50331648 (48 MiB).
    #[serde(deserialize_with = "node::units::size")]
    pub read_ahead_memory: u64,
    /// Chunks read from disk at once; clients take turns by bytes, whatever each of them asks for. Default: 16.
    pub reads_at_once: u32,
    /// Bytes per second that all deliveries together send at most; 0 for no limit. `willcall seeder limit` changes it
    /// while the seeder runs. Default: 0.
    #[serde(deserialize_with = "node::units::size")]
    pub upload_limit: u64,
    /// Bytes per second that each delivery sends at most; 0 for no limit. Default: 0.
    #[serde(deserialize_with = "node::units::size")]
    pub upload_limit_per_delivery: u64,
    /// Tickets that pay less are refused: millionths of the minor unit per MiB. Default: 0.
    pub min_rate: u64,
    /// Contents that this seeder neither holds nor serves, by content id. Default: none.
    pub deny: Vec<ContentId>,
    /// A client has this long to show its ticket. Default: 10000.
    pub hello_ms: u64,
    /// A client that neither asks nor acknowledges for so long is let go. Default: 60000.
    pub idle_ms: u64,
    /// A client that leaves its window full for so long is let go. Default: 60000.
    pub window_wait_ms: u64,
    /// A client that does not take 256 KiB of a chunk in so long is let go. Default: 30000.
    pub write_ms: u64,
    /// A delivery with acknowledgements goes on for so long after its lease. Default: 172800000 (48 hours).
    pub continuation_ms: u64,
    /// What is known of a delivery is kept for so long after its lease. Default: 2592000000 (30 days).
    pub account_keep_ms: u64,

    /// During a long delivery a receipt is made this often. Default: 10000.
    pub receipt_interval_ms: u64,
    /// Receipts are collected for so long before they go out together. Default: 1000.
    pub receipt_batch_ms: u64,
    /// Receipts that the manager has not confirmed after so long go to it directly. Default: 5000.
    pub receipt_direct_ms: u64,
    /// Receipts are kept for so long after a statement of account dealt with them. Default: 2592000000 (30 days).
    pub receipt_keep_ms: u64,
    /// Batches that wait for the manager; beyond it each delivery keeps its newest receipt and no batch is made.
    /// Default: 65536.
    pub max_waiting_batches: u64,

    /// Housekeeping of the gossip mesh; messages of the last five are offered to peers that missed them. Default: 1000.
    pub gossip_heartbeat_ms: u64,
    /// A gossip message is remembered for so long, so that it is not forwarded twice. Default: 300000 (5 minutes).
    pub gossip_memory_ms: u64,
    /// Between two reports to the manager. Default: 30000.
    pub report_ms: u64,
    /// When no heartbeat was heard for so long, the manager is asked for one. Default: 360000 (6 minutes).
    pub heartbeat_silence_ms: u64,
    /// The manager has so long to answer a call. Default: 10000.
    pub call_ms: u64,
    /// First pause after a call to the manager failed; it doubles up to a minute. Default: 1000.
    pub retry_ms: u64,
    /// Contents fetched from other seeders at once. Default: 2.
    pub replications: u32,
    /// A fetch that finds no seeder for so long is given up until the next report. Default: 60000.
    pub replication_patience_ms: u64,
    /// Between two looks at what need not be kept any longer. Default: 3600000 (1 hour).
    pub prune_ms: u64,
    /// Between two announcements of a content in the DHT, which forgets them after two hours. Default: 2700000 (45
    /// minutes).
    pub announce_ms: u64,

    /// Takes slots at relays for as long as nobody is known to reach this seeder directly. Default: true.
    pub use_relays: bool,
    /// Asks the router to forward the listening ports (UPnP), where external is not set. Default: true.
    pub upnp: bool,
    /// Finds nodes on the local network by multicast (mDNS), and is found. Default: false.
    pub lan: bool,
    /// Relays connections to seeders that nobody can dial: `enabled` (false), `slots` (128), `circuits` (64),
    /// `circuit-bytes` (131072), `circuit-ms` (120000).
    pub relay: node::RelayConfig,
}

impl Default for Config {
    fn default() -> Self {
        let listen = ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1"];
        Config {
            join: String::new(),
            name: "seeder".to_owned(),
            capacity: 10 * 1024 * MIB,
            max_inodes: 0,
            high_water_percent: 95,
            low_water_percent: 80,
            gc_ms: MINUTE,
            content_dir: PathBuf::from("content"),
            min_free: 256 * MIB,
            min_free_inodes: 1024,
            listen: listen.iter().filter_map(|text| Address::new(text).ok()).collect(),
            external: Vec::new(),
            metrics: None,
            clock_grace_ms: protocol::trust::DEFAULT_CLOCK_GRACE_MS,
            allow_key_log: false,
            max_deliveries: 256,
            max_deliveries_per_peer: 8,
            serve_memory: 256 * MIB,
            read_ahead_memory: 48 * MIB,
            reads_at_once: 16,
            upload_limit: 0,
            upload_limit_per_delivery: 0,
            min_rate: 0,
            deny: Vec::new(),
            hello_ms: 10 * SECOND,
            idle_ms: MINUTE,
            window_wait_ms: MINUTE,
            write_ms: 30 * SECOND,
            continuation_ms: 48 * HOUR,
            account_keep_ms: 30 * DAY,
            receipt_interval_ms: 10 * SECOND,
            receipt_batch_ms: SECOND,
            receipt_direct_ms: 5 * SECOND,
            receipt_keep_ms: 30 * DAY,
            max_waiting_batches: 65_536,
            gossip_heartbeat_ms: SECOND,
            gossip_memory_ms: 5 * MINUTE,
            report_ms: 30 * SECOND,
            heartbeat_silence_ms: 6 * MINUTE,
            call_ms: 10 * SECOND,
            retry_ms: SECOND,
            replications: 2,
            replication_patience_ms: MINUTE,
            prune_ms: HOUR,
            announce_ms: 45 * MINUTE,
            use_relays: true,
            upnp: true,
            lan: false,
            relay: node::RelayConfig::default(),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such file: the directory was not set up.
    #[error("{} does not exist; set the directory up with: willcall seeder init --dir {}", path.display(), dir.display())]
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
    /// An ordinary seeder that joins by `join` under `name` and offers `capacity` bytes.
    pub fn new(join: &JoinLine, name: &str, capacity: u64) -> Config {
        Config { join: join.to_string(), name: name.to_owned(), capacity, ..Config::default() }
    }

    /// The seeder beside a manager that holds every content: it leaves no disk unused, and keeps its content in
    /// `content_dir` (an absolute path, or one relative to the seeder's directory), where the manager publishes.
    pub fn origin(join: &JoinLine, content_dir: &Path) -> Config {
        // A petabyte: TOML has no larger round number that is surely an integer everywhere.
        let capacity = 1 << 50;
        Config {
            content_dir: content_dir.to_owned(),
            min_free: 0,
            min_free_inodes: 0,
            // Others have to reach the manager beside it in any case.
            use_relays: false,
            upnp: false,
            ..Config::new(join, "origin", capacity)
        }
    }

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
        config.check().map_err(|(key, reason)| ConfigError::Value { path: path.to_owned(), key, reason })?;
        Ok(config)
    }

    /// Checks the values; gives the key and what is wrong with it.
    pub(crate) fn check(&self) -> Result<JoinLine, (&'static str, String)> {
        let fail = |key: &'static str, reason: &str| Err((key, reason.to_owned()));
        if self.capacity == 0 {
            return fail("capacity", "must not be 0: say how much disk space is offered, such as 500GB");
        }
        let positive = [
            ("max-deliveries", u64::from(self.max_deliveries)),
            ("max-deliveries-per-peer", u64::from(self.max_deliveries_per_peer)),
            ("reads-at-once", u64::from(self.reads_at_once)),
            ("hello-ms", self.hello_ms),
            ("idle-ms", self.idle_ms),
            ("window-wait-ms", self.window_wait_ms),
            ("write-ms", self.write_ms),
            ("receipt-interval-ms", self.receipt_interval_ms),
            ("receipt-batch-ms", self.receipt_batch_ms),
            ("max-waiting-batches", self.max_waiting_batches),
            ("gossip-heartbeat-ms", self.gossip_heartbeat_ms),
            ("gossip-memory-ms", self.gossip_memory_ms),
            ("report-ms", self.report_ms),
            ("call-ms", self.call_ms),
            ("retry-ms", self.retry_ms),
            ("replications", u64::from(self.replications)),
            ("replication-patience-ms", self.replication_patience_ms),
            ("prune-ms", self.prune_ms),
            ("gc-ms", self.gc_ms),
            ("announce-ms", self.announce_ms),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return fail(key, "must not be 0: give at least 1, or remove the line for the default");
        }
        if self.high_water_percent > 100 || self.low_water_percent > self.high_water_percent {
            return fail("high-water-percent", "is at most 100, and low-water-percent at most as high");
        }
        if self.max_deliveries > 65_536 {
            return fail("max-deliveries", "is at most 65536");
        }
        if self.serve_memory < 64 * MIB {
            return fail("serve-memory", "is at least 67108864 (64 MiB)");
        }
        let uploads =
            [("upload-limit", self.upload_limit), ("upload-limit-per-delivery", self.upload_limit_per_delivery)];
        if let Some((key, _)) = uploads.iter().find(|(_, rate)| !feeds(*rate)) {
            return fail(
                key,
                "is too small: clients let go of a seeder that is so slow; give \"16kB\", more, or 0 for none",
            );
        }
        if self.name.is_empty() || self.name.len() > 64 {
            return fail("name", "has 1 to 64 bytes");
        }
        if self.announce_ms > 90 * MINUTE {
            return fail("announce-ms", "is at most 5400000 (90 minutes): announcements are forgotten after two hours");
        }
        self.relay.check().map_err(|(key, reason)| (key, reason.to_owned()))?;
        if self.listen.is_empty() {
            return fail("listen", "names no address; give one such as \"/ip4/0.0.0.0/tcp/0\"");
        }
        if self.join.is_empty() {
            return fail("join", "is missing; put there the line that `willcall manager invite seeder` prints");
        }
        let join: JoinLine = match self.join.parse() {
            Ok(join) => join,
            Err(error) => return Err(("join", format!("is not a join line: {error}"))),
        };
        if join.invitation.as_ref().is_none_or(|invitation| invitation.role != InvitedRole::Seeder) {
            return fail("join", "carries no invitation for a seeder; ask the network's operator for one");
        }
        Ok(join)
    }

    /// Where content lies, for a seeder at `dir`.
    pub fn content_path(&self, dir: &Path) -> PathBuf {
        dir.join(&self.content_dir)
    }
}

/// Least bytes per second that a limit may be: a client gives up whoever brings no chunk in time.
const LEAST_UPLOAD: u64 = 16_000;

fn feeds(rate: u64) -> bool {
    rate == 0 || rate >= LEAST_UPLOAD
}

/// A limit, bytes per second, at which a client is served in time; 0 for none.
///
/// # Errors
/// One line for people.
pub fn check_upload(rate: u64) -> Result<u64, String> {
    feeds(rate).then_some(rate).ok_or_else(|| {
        format!(
            "{rate} bytes per second are too few: clients let go of a seeder that is so slow; give 16kB, more, or none"
        )
    })
}

pub(crate) fn config_path(dir: &Path) -> PathBuf {
    dir.join("config.toml")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::trust::Invitation;
    use protocol::{Keypair, Nonce};

    use super::*;

    fn join(role: InvitedRole) -> JoinLine {
        let root = Keypair::from_seed(&[1; 32]).peer_id();
        let invitation = Some(Invitation { role, token: Nonce::from_bytes([2; 16]) });
        JoinLine { root, managers: vec![root.into()], invitation }
    }

    #[test]
    fn what_is_written_is_read_back_and_unknown_keys_are_named() {
        let config = Config::origin(&join(InvitedRole::Seeder), Path::new("/srv/content"));
        let text = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(Path::new("c"), &text).unwrap(), config);
        let error =
            Config::parse(Path::new("dir/config.toml"), "capacity = 1\nreprot-ms = 3\n").unwrap_err().to_string();
        assert!(error.contains("dir/config.toml") && error.contains("reprot-ms"), "{error}");
    }

    #[test]
    fn nothing_that_has_to_be_something_is_said_with_what_to_do() {
        let good = toml::to_string(&Config::new(&join(InvitedRole::Seeder), "x", 1)).unwrap();
        let mut keys: Vec<&str> = good.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect();
        keys.retain(|key| {
            let line = |text: &str| good.replace(text, &format!("{key} = 0"));
            let before = good.lines().find(|line| line.starts_with(&format!("{key} = "))).unwrap();
            let parsed = Config::parse(Path::new("dir/config.toml"), &line(before));
            matches!(parsed, Err(ConfigError::Value { reason, .. }) if reason.contains("must not be 0: "))
        });
        for key in ["capacity", "receipt-interval-ms", "replication-patience-ms", "report-ms", "max-deliveries"] {
            assert!(keys.contains(&key), "{key} of {keys:?}");
        }
        for key in ["upload-limit", "upload-limit-per-delivery"] {
            let slow = good.replace(&format!("{key} = 0\n"), &format!("{key} = \"15kB\"\n"));
            let error = Config::parse(Path::new("dir/config.toml"), &slow).unwrap_err().to_string();
            assert!(error.starts_with(&format!("dir/config.toml: {key} is too small: ")), "{error}");
        }
        assert!(check_upload(15_999).is_err_and(|says| says.contains("give 16kB, more, or none")));
        assert!(check_upload(0).is_ok() && check_upload(16_000).is_ok());
        let none = good.replace("capacity = 1\n", "capacity = 0\n");
        let error = Config::parse(Path::new("dir/config.toml"), &none).unwrap_err().to_string();
        let says = "must not be 0: say how much disk space is offered, such as 500GB";
        assert_eq!(error, format!("dir/config.toml: capacity {says}"));
    }

    #[test]
    fn a_line_without_a_seeders_invitation_is_refused_with_what_to_do() {
        for line in [join(InvitedRole::Merchant), join(InvitedRole::Seeder).public()] {
            let text = toml::to_string(&Config::new(&line, "x", 1)).unwrap();
            let error = Config::parse(Path::new("c"), &text).unwrap_err().to_string();
            assert!(error.contains("join carries no invitation for a seeder"), "{error}");
        }
        for (text, says) in [("", "join is missing"), ("join = \"x\"", "join is not a join line")] {
            let error = Config::parse(Path::new("c"), text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
