//! One process each: a node that runs until it is dropped, a command that runs to its end. None is left behind: each is
//! killed with the value that stands for it, and nodes also stop when this program's end of their input closes.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;

use super::{LIMIT, args, until, until_within};

/// The binary under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_willcall");

thread_local! {
    /// The command that starts the program, where it is not to be started here.
    static STARTER: RefCell<Vec<OsString>> = const { RefCell::new(Vec::new()) };
}

/// Has everything that `work` starts on this thread started by `starter`, such as `ip netns exec NAME`.
pub(crate) fn inside<T>(starter: Vec<OsString>, work: impl FnOnce() -> T) -> T {
    struct Back(Vec<OsString>);
    impl Drop for Back {
        fn drop(&mut self) {
            STARTER.set(std::mem::take(&mut self.0));
        }
    }
    let _back = Back(STARTER.replace(starter));
    work()
}

/// The program with these arguments and none of the user's settings.
pub(crate) fn program(args: &[OsString]) -> Command {
    let mut words = STARTER.with_borrow(Clone::clone);
    words.push(PROGRAM.into());
    let mut command = Command::new(words.remove(0));
    command.args(words).args(args).env_remove("WILLCALL_LOG").env_remove("WILLCALL_HOME").env_remove("WILLCALL_DIR");
    command
}

/// The file that tells a process over `dir` at which step to kill itself.
pub(crate) fn crash_file(dir: &Path) -> PathBuf {
    dir.with_extension("crash")
}

/// A node that runs.
pub(crate) struct Daemon {
    child: Child,
    /// What it said when it was ready.
    pub(crate) ready: Value,
}

impl Daemon {
    /// Starts a role over `dir`, its log at the end of the file `log`, and waits until it is ready.
    pub(crate) fn start(role: &str, dir: &Path, log: &Path) -> Daemon {
        let (mut daemon, first) = Daemon::launch(role, dir, log);
        let line = first.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{role} is not ready: {}", tail(log)));
        daemon.ready = serde_json::from_str(&line).unwrap();
        assert_eq!(daemon.ready["ready"], true, "{line}");
        daemon
    }

    /// Starts a role; what it prints comes through the channel.
    pub(crate) fn launch(role: &str, dir: &Path, log: &Path) -> (Daemon, Receiver<String>) {
        let args = args![role, "run", "--dir", dir, "--until-stdin-closes", "--json", "--log-file", log];
        let mut child = program(&args)
            .env(store::CRASH_FILE, crash_file(dir))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::options().create(true).append(true).open(log).unwrap())
            .spawn()
            .unwrap();
        let (sender, first) = channel();
        let out = child.stdout.take().unwrap();
        // Ends with the process.
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        (Daemon { child, ready: Value::Null }, first)
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop, and waits until it has in good order.
    pub(crate) fn stop(mut self) {
        drop(self.child.stdin.take());
        let status = until("the orderly end", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }

    /// Still there?
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// A field of `/proc/PID/status` in KiB, such as `VmRSS:` or `VmHWM:`.
    pub(crate) fn memory_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        field_kib(&status, field).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command under way.
pub(crate) struct Job {
    child: Child,
    shown: String,
    stdout: Option<JoinHandle<String>>,
    lines: Receiver<String>,
    stderr: String,
}

/// A command that ended.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    shown: String,
}

impl Job {
    /// Starts a command with `--json`.
    pub(crate) fn start(mut args: Vec<OsString>) -> Job {
        args.push("--json".into());
        Job::start_plain(args)
    }

    /// Starts a command.
    pub(crate) fn start_plain(args: Vec<OsString>) -> Job {
        let mut command = program(&args);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            out.read_to_string(&mut text).unwrap();
            text
        });
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let shown = args.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
        Job { child, shown, stdout: Some(stdout), lines, stderr: String::new() }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Did it end by itself?
    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for a line on standard error that holds `what`.
    pub(crate) fn says(&mut self, what: &str) {
        self.says_one_of(&[what]);
    }

    /// Waits for a line on standard error that holds one of these.
    pub(crate) fn says_one_of(&mut self, any: &[&str]) {
        let start = Instant::now();
        loop {
            let Ok(line) = self.lines.recv_timeout(LIMIT.saturating_sub(start.elapsed())) else {
                panic!("`{}` did not say '{}', but: {}", self.shown, any.join("' or '"), self.stderr)
            };
            self.stderr.push_str(&line);
            self.stderr.push('\n');
            if any.iter().any(|what| line.contains(what)) {
                return;
            }
        }
    }

    /// The most memory that it had by its end, KiB.
    pub(crate) fn watch_peak_kib(&mut self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let mut peak = 0;
        until_within("its end", LIMIT * 10, || {
            let status = std::fs::read_to_string(&path).unwrap_or_default();
            // A process that has ended has no memory any more.
            match field_kib(&status, "VmHWM:") {
                Some(now) => peak = now,
                None => return Some(()),
            }
            None
        });
        peak
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Finished {
        let start = Instant::now();
        let status = until_within(&format!("the end of `{}`", self.shown), LIMIT * 2, || {
            // What it says must not fill the pipe.
            while let Ok(line) = self.lines.try_recv() {
                self.stderr.push_str(&line);
                self.stderr.push('\n');
            }
            assert!(start.elapsed() < LIMIT, "`{}` did not end, and said: {}", self.shown, self.stderr);
            self.child.try_wait().unwrap()
        });
        let stdout = self.stdout.take().unwrap().join().unwrap();
        while let Ok(line) = self.lines.recv_timeout(LIMIT) {
            self.stderr.push_str(&line);
            self.stderr.push('\n');
        }
        Finished { status, stdout, stderr: std::mem::take(&mut self.stderr), shown: self.shown.clone() }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// The one JSON object of a command that succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert!(self.status.success(), "`{}` failed with {}: {}", self.shown, self.status, self.stderr);
        self.json()
    }

    /// The one JSON object on standard output.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(self.stdout.trim())
            .unwrap_or_else(|e| panic!("`{}` printed no JSON object ({e}): {}", self.shown, self.stdout))
    }

    /// A command that failed as it should: exit code, one line on standard error that says all of `what`, and with
    /// `--json` the same as an object. Gives the line.
    #[track_caller]
    pub(crate) fn refused(&self, what: &[&str]) -> String {
        let (shown, said) = (&self.shown, self.stderr.trim_end());
        assert_eq!(self.status.code(), Some(1), "`{shown}`: {said}");
        assert!(said.starts_with("willcall: ") && !said.contains('\n'), "`{shown}` said: {said}");
        for part in what {
            assert!(said.contains(part), "`{shown}` should say '{part}': {said}");
        }
        if shown.ends_with("--json") {
            let json = self.json();
            assert_eq!(json["ok"], false, "{json}");
            assert_eq!(Some(json["error"]["message"].as_str().unwrap()), said.strip_prefix("willcall: "));
        } else {
            assert_eq!(self.stdout, "", "`{shown}`");
        }
        said.to_owned()
    }
}

fn field_kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// Processes whose command line names `path`.
pub(crate) fn processes_naming(path: &Path) -> Vec<PathBuf> {
    let wanted = path.to_string_lossy().into_owned();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|entry| {
            let line = std::fs::read(entry.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&wanted)
        })
        .collect()
}
