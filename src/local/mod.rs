//! A network on this machine, every node a process of its own, set up through the same commands that a user types. The
//! demo and `willcall testnet up` build on it.

mod narrator;
mod processes;
mod sample;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::args;
use crate::cli::output::{field, rows};
pub(crate) use narrator::Narrator;
pub(crate) use processes::{Daemon, Workshop};
pub(crate) use sample::album;

/// How long the network may take for things that happen by themselves: copies, receipts, settlement.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How far the clocks of a local network may differ: little, because it is one clock, and leases are to end on time.
pub(crate) const CLOCK_GRACE_MS: u64 = 1000;

/// The network: where its files are, and what runs.
pub(crate) struct Network {
    workshop: Workshop,
    narrator: Narrator,
    daemons: Vec<Daemon>,
}

impl Network {
    /// An empty network in `dir`.
    pub(crate) fn new(dir: &Path, narrator: Narrator) -> Result<Self> {
        Ok(Network { workshop: Workshop::new(dir)?, narrator, daemons: Vec::new() })
    }

    /// Who tells.
    pub(crate) fn narrator(&self) -> &Narrator {
        &self.narrator
    }

    /// Where files and logs are.
    pub(crate) fn workshop(&self) -> &Workshop {
        &self.workshop
    }

    /// A node that runs.
    pub(crate) fn daemon(&self, name: &str) -> Result<&Daemon> {
        self.daemons.iter().find(|d| d.name == name).with_context(|| format!("no {name} runs"))
    }

    /// Stops everything: first, and all at once, those that report to the manager, then the manager. Reports the first
    /// that did not end well.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        let (managers, others): (Vec<Daemon>, Vec<Daemon>) =
            std::mem::take(&mut self.daemons).into_iter().partition(|daemon| daemon.name == "manager");
        let mut result = Ok(());
        for group in [others, managers] {
            for stopped in futures::future::join_all(group.into_iter().map(Daemon::stop)).await {
                result = result.and(stopped);
            }
        }
        result
    }

    /// Waits until a node ends that nobody stopped, and says so in a line; each is told once.
    pub(crate) async fn next_end(&mut self) -> String {
        let ends: Vec<_> = self.daemons.iter_mut().map(|daemon| Box::pin(daemon.ended())).collect();
        if ends.is_empty() {
            return std::future::pending().await;
        }
        futures::future::select_all(ends).await.0
    }

    /// What the nodes' logs say about a failure: the end of the log of any that stopped by itself, else the last
    /// complaints of each.
    pub(crate) fn casualties(&mut self) -> String {
        let mut text = String::new();
        for daemon in &mut self.daemons {
            if !daemon.is_running() {
                text.push_str(&format!("; {} had stopped, end of its log: {}", daemon.name, daemon.log_tail()));
            }
        }
        if text.is_empty() {
            for daemon in &self.daemons {
                let complaints = daemon.complaints();
                if !complaints.is_empty() {
                    text.push_str(&format!("; {} complained: {complaints}", daemon.name));
                }
            }
        }
        text
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.workshop.folder(name)
    }

    pub(crate) async fn command(&self, name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Value> {
        self.workshop.run(name, args).await
    }

    pub(crate) async fn start(&mut self, name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Value> {
        let daemon = self.workshop.start(name, args).await?;
        let ready = daemon.ready.clone();
        self.narrator.say(&format!("  {name:<10} {}", field(&ready, "peer")));
        self.daemons.push(daemon);
        Ok(ready)
    }

    pub(crate) async fn start_manager(&mut self, seeders: u16) -> Result<()> {
        let dir = self.folder("manager");
        let mut init: Vec<OsString> = args!["manager", "init", "--dir", &dir].into();
        for setting in [format!("copies={seeders}"), format!("clock-grace-ms={CLOCK_GRACE_MS}")] {
            init.extend(args!["--set", setting]);
        }
        init.extend(listen());
        self.command("manager", init).await?;
        self.start("manager", args!["manager", "run", "--dir", &dir]).await?;
        Ok(())
    }

    pub(crate) async fn invite(&self, role: &str) -> Result<String> {
        let answer =
            self.command("manager-cli", args!["manager", "invite", role, "--dir", self.folder("manager")]).await?;
        answer.get("join").and_then(Value::as_str).map(str::to_owned).context("the manager gave no join line")
    }

    pub(crate) async fn start_merchant(&mut self) -> Result<()> {
        let (dir, join) = (self.folder("merchant"), self.invite("merchant").await?);
        let mut init: Vec<OsString> =
            args!["merchant", "init", "--dir", &dir, "--join", join, "--name", "Demo Records", "--http", "127.0.0.1:0"]
                .into();
        init.extend(listen());
        self.command("merchant", init).await?;
        self.start("merchant", args!["merchant", "run", "--dir", &dir]).await?;
        Ok(())
    }

    pub(crate) async fn start_seeder(&mut self, number: u16) -> Result<()> {
        let name = format!("seeder-{number}");
        let (dir, join) = (self.folder(&name), self.invite("seeder").await?);
        let mut init: Vec<OsString> =
            args!["seeder", "init", "--dir", &dir, "--join", join, "--name", &name, "--capacity", "64GiB"].into();
        init.extend(args!["--set", format!("clock-grace-ms={CLOCK_GRACE_MS}")]);
        init.extend(listen());
        self.command(&name, init).await?;
        self.start(&name, args!["seeder", "run", "--dir", &dir]).await?;
        Ok(())
    }

    /// Is there room for all the copies of goods that a local network makes? Better asked before they are waited for.
    pub(crate) fn check_space(&self, path: &Path, seeders: u16) -> Result<()> {
        /// What seeders and origin leave free on a disk of theirs, and databases and logs beside it.
        const SPARE: u64 = (256 + 64) << 20;
        // The origin's and the seeders', and what the client has of it while it puts it into its place.
        let copies = u64::from(seeders) + 3;
        let dir = self.workshop.dir();
        let needed = total_size(path)?.saturating_mul(copies).saturating_add(SPARE);
        let free = delivery::free_space(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
        if free < needed {
            bail!(
                "{} has {free} bytes free, and {needed} are needed for {copies} copies and what each node leaves free; name a \
                 roomier folder by TMPDIR or --keep",
                dir.display()
            );
        }
        Ok(())
    }

    pub(crate) async fn publish(&self, path: &Path, title: &str, price: &str, more: &[&str]) -> Result<Value> {
        let size = total_size(path)?;
        let mut publish: Vec<OsString> = args!["manager", "publish", path, "--dir", self.folder("manager")].into();
        publish.extend(args![
            "--title",
            title,
            "--price",
            price,
            "--currency",
            "USD",
            "--chunk-size",
            chunk_size(size)
        ]);
        publish.extend(args!["--share", "The Tone Collective=60", "--rate", rate(size).to_string()]);
        publish.extend(more.iter().map(OsString::from));
        let mut product = self.command("manager-cli", publish).await?;
        let id = product.get("product").cloned().unwrap_or_default();
        let keep = ["root", "manifest", "plain_bytes", "content_bytes", "chunks", "files"];
        let kept = keep.iter().map(|k| ((*k).to_owned(), product.get_mut(*k).map(Value::take).unwrap_or_default()));
        Ok([("id".to_owned(), id)].into_iter().chain(kept).collect())
    }

    /// Asks the manager again and again, within the limit, until `done` finds what it looks for.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        args: Vec<OsString>,
        done: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        let start = tokio::time::Instant::now();
        loop {
            tick.tick().await;
            let answer = self.command("manager-cli", args.clone()).await?;
            if let Some(found) = done(&answer) {
                return Ok(found);
            }
            if start.elapsed() > limit {
                bail!("{what} did not happen in {} s; the manager says: {answer}", limit.as_secs());
            }
        }
    }

    pub(crate) async fn wait_for_copies(&self, product: &Value, copies: usize) -> Result<()> {
        let ask = args!["manager", "product", field(product, "id"), "--dir", self.folder("manager")].into();
        // A slow disk writes some MiB a second, and all copies are written to the same one here.
        let bytes = product.get("content_bytes").and_then(Value::as_u64).unwrap_or_default();
        let limit = PATIENCE + Duration::from_secs(bytes.saturating_mul(copies as u64) / (8 << 20));
        self.until("the copying to the seeders", limit, ask, |answer| {
            (rows(answer, "holders").len() >= copies).then_some(())
        })
        .await?;
        self.narrator.say(&format!("  {copies} seeders hold it, as ciphertext"));
        Ok(())
    }

    pub(crate) async fn client(&self, name: &str) -> Result<String> {
        let answer = self.command(name, args!["id", "--home", self.folder(name)]).await?;
        answer.get("peer").and_then(Value::as_str).map(str::to_owned).context("the client has no peer ID")
    }

    pub(crate) async fn voucher(&self) -> Result<String> {
        let issue =
            args!["merchant", "vouchers", "issue", VOUCHER, "--currency", "USD", "--dir", self.folder("merchant")];
        let answer = self.command("merchant-cli", issue).await?;
        answer.pointer("/codes/0").and_then(Value::as_str).map(str::to_owned).context("no voucher code was issued")
    }

    pub(crate) fn shop(&self) -> Result<String> {
        let merchant = self.daemons.iter().find(|d| d.name == "merchant").context("no merchant runs")?;
        merchant
            .ready
            .get("http")
            .and_then(Value::as_str)
            .map(str::to_owned)
            .context("the merchant names no HTTP address")
    }
}

/// Loopback only, ports chosen by the system.
fn listen() -> [OsString; 4] {
    args!["--listen", "/ip4/127.0.0.1/tcp/0", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1"]
}

/// What the vouchers of a local network are worth.
const VOUCHER: &str = "50.00";

/// Small goods in small chunks, so that several seeders have something to do.
fn chunk_size(bytes: u64) -> &'static str {
    match bytes {
        0..=16_777_215 => "64KiB",
        16_777_216..=268_435_455 => "256KiB",
        _ => "1MiB",
    }
}

/// A dollar for the whole delivery, in millionths of a cent per MiB: so that there is something to settle.
fn rate(bytes: u64) -> u64 {
    100_000_000 / (bytes >> 20).max(1)
}

fn total_size(path: &Path) -> Result<u64> {
    let stat = std::fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !stat.is_dir() {
        return Ok(stat.len());
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    entries.map(|entry| total_size(&entry?.path())).sum()
}
