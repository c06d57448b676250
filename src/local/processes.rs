//! Processes of a local network: every node is the same binary run as a user would run it, with its log in a file, and none
//! outlives the program. A daemon is ready when it says so on standard output; it stops when its standard input closes,
//! which happens even when the demo itself is killed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

/// How long a daemon may take until it is ready, and until it has stopped.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long one that failed has for its end.
const LAST_WORDS: Duration = Duration::from_secs(5);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Where the binary, the folders and the logs are.
#[derive(Clone, Debug)]
pub(crate) struct Workshop {
    binary: PathBuf,
    dir: PathBuf,
}

/// A node that runs until it is stopped.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) name: String,
    child: Child,
    /// It runs as long as this is open; whoever waits for a child closes what is left with it.
    _stdin: Option<ChildStdin>,
    /// It ended by itself, and somebody was told.
    told: bool,
    log: PathBuf,
    /// What it said when it was ready.
    pub(crate) ready: Value,
}

impl Workshop {
    /// Works in `dir`, which exists.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("logs")).with_context(|| format!("cannot make {}/logs", dir.display()))?;
        let binary = std::env::current_exe().context("cannot find out where this program is")?;
        Ok(Workshop { binary, dir: dir.to_owned() })
    }

    /// What all of them work in.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A folder of one node.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The log of one node.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    fn command(&self, name: &str, args: &[OsString]) -> Result<(Command, PathBuf)> {
        let log = self.log(name);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(&self.binary);
        command
            .args(args)
            .arg("--json")
            .args(["--log", "info", "--log-format", "json"])
            .env_remove("WILLCALL_LOG")
            .env_remove("WILLCALL_HOME")
            // Sockets whose own folder has too long a path are made here, and go away with the rest.
            .env("XDG_RUNTIME_DIR", &self.dir)
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true);
        Ok((command, log))
    }

    /// Runs a command to its end and returns the JSON object that it printed.
    pub(crate) async fn run(&self, name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Value> {
        let args: Vec<OsString> = args.into_iter().collect();
        let (mut command, log) = self.command(name, &args)?;
        let output = finished(command.stdin(Stdio::null())).await?;
        let shown = shown(&args);
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let said = serde_json::from_str::<Value>(text.trim()).ok();
            let why = said.as_ref().and_then(|v| v.pointer("/error/message")).and_then(Value::as_str);
            bail!("`{shown}` failed: {}", why.map_or_else(|| tail(&log), str::to_owned));
        }
        serde_json::from_str(text.trim()).with_context(|| format!("`{shown}` printed no JSON object: {text}"))
    }

    /// As [`Workshop::run`], with the command's standard error (its progress display) shown to the user.
    pub(crate) async fn run_shown(&self, name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Value> {
        let args: Vec<OsString> = args.into_iter().collect();
        let (mut command, log) = self.command(name, &args)?;
        command.arg("--log-file").arg(&log).arg("--progress=text").stderr(Stdio::inherit()).stdin(Stdio::null());
        let output = finished(&mut command).await?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("`{}` failed: {}", shown(&args), text.trim());
        }
        serde_json::from_str(text.trim()).with_context(|| format!("`{}` printed no JSON object", shown(&args)))
    }

    /// Starts a daemon and waits until it is ready.
    pub(crate) async fn start(&self, name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Daemon> {
        let args: Vec<OsString> = args.into_iter().collect();
        let (mut command, log) = self.command(name, &args)?;
        command.arg("--until-stdin-closes").stdin(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let stdin = child.stdin.take();
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(START_LIMIT, lines.next_line()).await;
        let said = match &line {
            Ok(Ok(Some(line))) => serde_json::from_str::<Value>(line).ok(),
            _ => None,
        };
        let ready = said.as_ref().filter(|said| said.get("ready") == Some(&Value::Bool(true)));
        let Some(ready) = ready.cloned() else {
            if line.is_err() {
                bail!("{name} did not get ready in time; end of its log:\n{}", tail(&log));
            }
            // What it says last may come after what it printed.
            let _ = tokio::time::timeout(LAST_WORDS, child.wait()).await;
            let why = said.as_ref().and_then(|said| said.pointer("/error/message")).and_then(Value::as_str);
            let why = why.map(|why| format!(": {why}")).unwrap_or_default();
            bail!("{name} stopped at its start{why}; end of its log:\n{}", tail(&log));
        };
        // A daemon may go on to print; nobody reads it here, and a full pipe must not stop it.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Daemon { name: name.to_owned(), child, _stdin: stdin, told: false, log, ready })
    }
}

/// Runs a command to its end. (`Command::output` would take standard error for itself.)
async fn finished(command: &mut Command) -> Result<std::process::Output> {
    let child = command.spawn().context("cannot start a process of this program")?;
    child.wait_with_output().await.context("cannot wait for a process of this program")
}

impl Daemon {
    /// Asks it to stop, waits, and says so if it did not end well.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended by itself in between; the wait below tells.
            let _ = kill_process(pid, Signal::TERM);
        }
        match tokio::time::timeout(STOP_LIMIT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => bail!("{} ended with {status}; end of its log:\n{}", self.name, tail(&self.log)),
            Ok(Err(error)) => bail!("{}: {error}", self.name),
            Err(_) => {
                let _ = self.child.kill().await;
                bail!("{} did not stop in {} s and was killed", self.name, STOP_LIMIT.as_secs())
            }
        }
    }

    /// Still there?
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends by itself, and says how; for ever once it was told.
    pub(crate) async fn ended(&mut self) -> String {
        if self.told {
            return std::future::pending().await;
        }
        let how = match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        self.told = true;
        format!("{} has ended ({how}); its log is {}", self.name, self.log.display())
    }

    /// The last warnings and errors in its log.
    pub(crate) fn complaints(&self) -> String {
        const LINES: usize = 2;
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let loud = |line: &&str| line.contains("\"level\":\"WARN\"") || line.contains("\"level\":\"ERROR\"");
        let lines: Vec<&str> = text.lines().filter(loud).collect();
        lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join(" ")
    }

    /// The end of its log.
    pub(crate) fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    const LINES: usize = 15;
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let start = lines.len().saturating_sub(LINES);
    let end = lines.get(start..).unwrap_or_default();
    if end.is_empty() { format!("(nothing in {})", log.display()) } else { end.join("\n") }
}

fn shown(args: &[OsString]) -> String {
    let words: Vec<_> = args.iter().take(4).map(|a| a.to_string_lossy().into_owned()).collect();
    format!("willcall {}", words.join(" "))
}

/// Arguments from anything that is text or a path.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(std::ffi::OsString::from($arg)),*] };
}
