//! `willcall manager keys …`: changes the network's keys. The root key is read by this command and not by the manager; it
//! may be on another machine, and then a request and its answer are carried there and back as files.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use node::units::parse_time;
use protocol::PeerId;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::Global;
use super::daemon::{ask, call};
use super::facts::listed;
use super::goods::void;
use super::key_files::{self, Request};
use super::manager::DirArgs;
use super::new_file::{new_place, write_whole};
use super::output::{Answer, field, rows};

/// Commands about keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the network's keys and their state
    List(DirArgs),
    /// List products on sale, and purchases that are not delivered, which are void because a catalogue key was revoked
    Void(DirArgs),
    /// Replace the key of a purpose; what the old one signed stays good for a time
    Rotate(RotateArgs),
    /// Make void everything that a key signed
    Revoke(RevokeArgs),
    /// Show what a request changes and sign it with the root key, on whatever machine has it
    Sign(SignArgs),
    /// Put a signed key set in force
    Install(InstallArgs),
    /// Name the root key that is to follow: nodes take no other then
    NextRoot(NextRootArgs),
    /// Sign, with the root key, that another key is to follow it; the file is kept until it is needed
    Handover(HandoverArgs),
    /// Write a root key, or a client's key, to a file that opens by a passphrase only
    Seal(SealArgs),
    /// Let another root key take over: the network keeps its name, and join lines stay good
    ChangeRoot(ChangeRootArgs),
}

/// What a key is for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Purpose {
    /// Manifests
    Catalogue,
    /// Transaction data and leases
    Ticket,
    /// Certificates of merchants and seeders
    Enrolment,
    /// Revocation epochs and heartbeats
    Revocation,
    /// Marks, statements and evidence
    Settlement,
    /// Receipts are sealed to it
    ReceiptSealing,
}

/// Where the root key is.
#[derive(Debug, Args)]
struct RootArgs {
    /// The root key's file [default: root.key in the data folder]
    #[arg(long, value_name = "FILE", conflicts_with = "request")]
    root_key: Option<PathBuf>,
    /// Write a request to this file instead, to be signed where the root key is
    #[arg(long, value_name = "FILE")]
    request: Option<PathBuf>,
    /// With --request: the old key goes on until the answer is back, for so long at most
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "7d")]
    within: u64,
}

/// Flags of `rotate`.
#[derive(Debug, Args)]
pub(crate) struct RotateArgs {
    /// Which key
    purpose: Purpose,
    /// The old key was stolen: everything that it signed is void
    #[arg(long, conflicts_with = "good_for")]
    stolen: bool,
    /// What the old key signed stays good for so long [default: 30d for tickets, longer for the others]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    good_for: Option<u64>,
    #[command(flatten)]
    root: RootArgs,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `revoke`.
#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    /// The key, from `keys list`
    key: PeerId,
    #[command(flatten)]
    root: RootArgs,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `sign`.
#[derive(Debug, Args)]
pub(crate) struct SignArgs {
    /// The request
    request: PathBuf,
    /// The root key's file
    #[arg(long, value_name = "FILE")]
    root_key: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Flags of `install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// What `keys sign` wrote
    signed: PathBuf,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `next-root`.
#[derive(Debug, Args)]
pub(crate) struct NextRootArgs {
    /// The key that is to follow
    key: PeerId,
    #[command(flatten)]
    root: RootArgs,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `handover`.
#[derive(Debug, Args)]
pub(crate) struct HandoverArgs {
    /// The key that is to follow
    key: PeerId,
    /// File of the root key that hands over
    #[arg(long, value_name = "FILE")]
    root_key: PathBuf,
    /// The network, where its root key was changed before
    #[arg(long, value_name = "ID")]
    network: Option<protocol::NetworkId>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Flags of `seal`.
#[derive(Debug, Args)]
pub(crate) struct SealArgs {
    /// The key's file, such as `root.key`. Nodes start without a passphrase: theirs stay as they are
    key: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Flags of `change-root`.
#[derive(Debug, Args)]
pub(crate) struct ChangeRootArgs {
    /// The handover: `next-root.handover` of `init`, or what `keys handover` wrote
    handover: PathBuf,
    /// The key that is to follow the new root key in its turn
    #[arg(long, value_name = "KEY")]
    then: Option<PeerId>,
    /// The new root key, or a request for where that is
    #[command(flatten)]
    root: RootArgs,
    #[command(flatten)]
    dir: DirArgs,
}

/// A signature and a change are made at once where the root key is here; this is for the clock's steps and slow disks.
const MARGIN_MS: u64 = 60_000;

/// What a change of the root key without `--then` leaves behind.
const NO_NEXT_ROOT: &str = "\nno next root key is named from now on: whoever gets hold of this one can hand the network \
                            over to any key. Name one: willcall manager keys next-root KEY";

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::List(dir) => {
            let columns = &["purpose", "key", "state", "not_issued_after", "dead_after", "private_half_here"];
            ask(&dir.path(), json!({"cmd": "keys-list"}), global, |a| listed(a, "keys", columns)).await
        }
        Command::Void(dir) => {
            let text = |a: &Value| match void(Some(a)) {
                text if text.is_empty() => "nothing on sale, and no purchase, is void".to_owned(),
                text => text.trim_start().to_owned(),
            };
            ask(&dir.path(), json!({"cmd": "keys-void"}), global, text).await
        }
        Command::Rotate(args) => {
            let purpose = args.purpose.to_possible_value().map(|value| value.get_name().to_owned());
            let request = json!({"purpose": purpose, "stolen": args.stolen, "good_for_ms": args.good_for});
            change(&args.dir.path(), request, &args.root, global).await
        }
        Command::Revoke(args) => change(&args.dir.path(), json!({"revoke": args.key}), &args.root, global).await,
        Command::Sign(args) => {
            let request = Request::read(&args.request)?;
            let changes = request.changes()?;
            let signed = sign(&request.next, &args.root_key)?;
            write_whole(&args.output, &key_files::signed(&signed))?;
            let text = format!(
                "{}\n\nsigned key set in {}\nNext, at the manager: willcall manager keys install {} --dir DIR",
                changes.join("\n"),
                args.output.display(),
                args.output.display()
            );
            Answer::new(json!({"path": args.output, "changes": changes}), text).print(global.json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::NextRoot(args) => change(&args.dir.path(), json!({"next_root": args.key}), &args.root, global).await,
        Command::Handover(args) => {
            let passphrase = super::client::passphrase_of(&args.root_key)?;
            let passphrase = passphrase.as_deref().map(String::as_str);
            let signed = manager_node::sign_handover(&args.root_key, passphrase, args.key, args.network)?;
            write_whole(&args.output, &signed)?;
            let text = format!("handover in {}: keep it apart from the key that it is for", args.output.display());
            Answer::new(json!({"path": args.output, "root": args.key}), text).print(global.json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Seal(args) => {
            if node::key_is_sealed(&args.key)? {
                bail!("{} is sealed already", args.key.display());
            }
            let (keypair, output) = (node::load_key(&args.key, None)?, new_place(&args.output)?);
            node::save_key(&output, &keypair, Some(&new_passphrase(&args.output)?))?;
            let (key, sealed) = (args.key.display(), args.output.display());
            let text = format!(
                "sealed key in {sealed}\nNobody opens it without the passphrase. Use it once (--root-key), then remove {key}"
            );
            Answer::new(json!({"path": args.output, "key": keypair.peer_id()}), text).print(global.json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::ChangeRoot(args) => {
            if args.root.root_key.is_none() && args.root.request.is_none() {
                bail!("name the new root key with --root-key, or write a --request for where it is");
            }
            let request = json!({"handover": key_files::read(&args.handover)?, "next_root": args.then});
            change(&args.dir.path(), request, &args.root, global).await
        }
        Command::Install(args) => {
            let request = json!({"cmd": "keys-install", "signed": key_files::read_signed(&args.signed)?});
            let text = |a: &Value| format!("key set {} is in force{}", field(a, "version"), void(a.get("void")));
            ask(&args.dir.path(), request, global, text).await
        }
    }
}

/// A passphrase for a new file: what is mistyped would be lost.
fn new_passphrase(file: &Path) -> Result<Zeroizing<String>> {
    let passphrase = match std::env::var("WILLCALL_PASSPHRASE") {
        Ok(passphrase) => Zeroizing::new(passphrase),
        Err(_) => {
            let ask = |prompt: String| {
                let typed = rpassword::prompt_password(prompt).context("cannot ask for a passphrase")?;
                Ok::<_, anyhow::Error>(Zeroizing::new(typed))
            };
            let typed = ask(format!("Passphrase for {}: ", file.display()))?;
            if *typed != *ask("The same again: ".to_owned())? {
                bail!("these are two passphrases; nothing was written");
            }
            typed
        }
    };
    if passphrase.is_empty() {
        bail!("an empty passphrase seals nothing");
    }
    Ok(passphrase)
}

async fn change(dir: &Path, mut request: Value, root: &RootArgs, global: &Global) -> Result<ExitCode> {
    let root_key = root.root_key.clone().unwrap_or_else(|| dir.join("root.key"));
    if root.request.is_none() && !root_key.exists() {
        bail!("there is no root key {}; name it with --root-key, or write a --request for it", root_key.display());
    }
    if let Some(fields) = request.as_object_mut() {
        let margin = if root.request.is_some() { root.within } else { MARGIN_MS };
        fields.insert("cmd".into(), json!("keys-prepare"));
        fields.insert("margin_ms".into(), json!(margin));
    }
    let next_root = request.get("handover").and(request.get("next_root")).cloned();
    let mut prepared = call(dir, request).await?;
    let bytes: Vec<u8> = serde_json::from_value(prepared.get("request").cloned().unwrap_or_default())
        .context("the manager answered without a request")?;
    if let Some(fields) = prepared.as_object_mut() {
        fields.remove("request");
        next_root.map(|key| fields.insert("next_root".into(), key));
    }
    let in_force: Vec<u8> = serde_json::from_value(prepared.get("in_force").cloned().unwrap_or_default())
        .context("the manager answered without its key set")?;
    if let Some(fields) = prepared.as_object_mut() {
        fields.remove("in_force");
    }
    if let Some(path) = &root.request {
        write_whole(path, &Request { in_force, next: bytes }.to_bytes())?;
        let text = format!(
            "{}\nNext, where the root key is: willcall manager keys sign {} --root-key FILE -o SIGNED{}",
            changed(&prepared),
            path.display(),
            match void(prepared.get("void")) {
                text if text.is_empty() => text,
                text => format!("\n\nOnce it is in force:{text}"),
            }
        );
        prepared.as_object_mut().map(|fields| fields.insert("path".into(), json!(path)));
        Answer::new(prepared, text).print(global.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let signed = sign(&bytes, &root_key)?;
    call(dir, json!({"cmd": "keys-install", "signed": signed})).await?;
    let void = void(prepared.get("void"));
    let text = format!("{}\nkey set {} is in force{void}", changed(&prepared), field(&prepared, "version"));
    Answer::new(prepared, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// What a prepared change is about, for people.
fn changed(prepared: &Value) -> String {
    let (key, replaced) = (field(prepared, "key"), field(prepared, "replaced"));
    let lost = rows(prepared, "lost").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let lost = if lost.is_empty() { lost } else { format!("\nreplaces, because they are not here: {lost}") };
    let own = rows(prepared, "own").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let own = match own.is_empty() {
        true => own,
        false => format!("\nnames keys of this manager that the network has not seen (void if stolen): {own}"),
    };
    let still = rows(prepared, "still_good").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let still = match still.is_empty() {
        true => still,
        false => format!(
            "\nreplaced before, and good for what they signed until their time is over: {still}; where they were stolen, \
             too: willcall manager keys revoke KEY"
        ),
    };
    let no_next = if prepared.get("next_root") == Some(&Value::Null) { NO_NEXT_ROOT } else { "" };
    format!("new key {key}\nreplaces {replaced}{lost}{own}{still}{no_next}")
}

fn sign(request: &[u8], root_key: &Path) -> Result<Vec<u8>> {
    let passphrase = super::client::passphrase_of(root_key)?;
    Ok(manager_node::sign_key_set(request, root_key, passphrase.as_deref().map(String::as_str))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_root_key_that_names_no_next_one_says_so() {
        let named = json!({"key": "b", "replaced": "a", "next_root": "c"});
        assert_eq!(changed(&named), "new key b\nreplaces a");
        let unnamed = changed(&json!({"key": "b", "replaced": "a", "next_root": null}));
        assert!(unnamed.contains("no next root key is named") && unnamed.contains("keys next-root KEY"), "{unnamed}");
        // Another change leaves the name as it is.
        assert_eq!(changed(&json!({"key": "b", "replaced": "a"})), "new key b\nreplaces a");
    }
}
