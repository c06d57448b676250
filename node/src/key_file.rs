//! A node is its key, so the file that holds it is written so that a crash cannot leave half of it, never over an
//! existing one, and is not read when others on the machine can read it too.
//!
//! Text form, one field a line: a title with the version, `peer` (the public name, also a check), then either `seed`
//! (64 hex digits) or `kdf`, `salt`, `nonce`, `box` (Argon2id, then AES-256-GCM over the seed, with the lines above
//! `nonce` as additional data), and last `check`: the first 8 bytes of the SHA-256 of all lines above it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;
use protocol::Keypair;
use zeroize::Zeroizing;

const TITLE: &str = "willcall-key 1";
/// A key file has about 400 bytes; more is something else.
const MAX_FILE: usize = 4096;
/// Memory (KiB), passes and lanes of Argon2id for new files: 64 MiB and three passes, a fraction of a second (the
/// second recommended option of RFC 9106).
const KDF: (u32, u32, u32) = (64 * 1024, 3, 4);
/// What a file may ask for at most, so that a planted one cannot take all memory.
const KDF_MAX: (u32, u32, u32) = (1024 * 1024, 16, 16);

/// Why a key file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// There is no such file.
    #[error("key file {} does not exist; restore it from a backup, or set up a new node in another directory", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// There is a file already, and it is left as it is.
    #[error("key file {} exists already; it is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Other users of the machine can read it.
    #[error("key file {} can be read by others (mode {mode:04o}); run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not a key file, or was changed or cut off.
    #[error("key file {} is damaged: {reason}; restore it from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It is sealed and no passphrase was given.
    #[error("key file {} is sealed; give its passphrase", path.display())]
    Sealed {
        /// The file.
        path: PathBuf,
    },
    /// The passphrase does not open it.
    #[error("the passphrase does not open key file {}", path.display())]
    WrongPassphrase {
        /// The file.
        path: PathBuf,
    },
    /// The system does not let us.
    #[error("cannot {what} key file {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The cryptographic library failed.
    #[error("cannot make key file {}: {reason}", path.display())]
    Crypto {
        /// The file.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// Makes a new key and its file, sealed if a passphrase is given. Blocks for a fraction of a second with one.
///
/// # Errors
/// [`KeyFileError::Exists`] rather than overwriting a file.
pub fn create_key(path: &Path, passphrase: Option<&str>) -> Result<Keypair, KeyFileError> {
    let mut seed = Zeroizing::new([0; 32]);
    random(path, seed.as_mut())?;
    let keypair = Keypair::from_seed(&seed);
    save_key(path, &keypair, passphrase)?;
    Ok(keypair)
}

/// Writes a key to a new file, sealed if a passphrase is given.
///
/// # Errors
/// [`KeyFileError::Exists`] rather than overwriting a file.
pub fn save_key(path: &Path, keypair: &Keypair, passphrase: Option<&str>) -> Result<(), KeyFileError> {
    let text = match passphrase {
        Some(passphrase) => sealed_text(path, keypair, passphrase)?,
        None => open_text(keypair),
    };
    write_new(path, &text)
}

/// Reads a key file.
///
/// # Errors
/// [`KeyFileError`]; each names the file and what to do.
pub fn load_key(path: &Path, passphrase: Option<&str>) -> Result<Keypair, KeyFileError> {
    let text = read(path)?;
    let fields = parse(path, &text)?;
    let seed = match fields.get("seed") {
        Some(seed) => Zeroizing::new(fixed::<32>(path, "seed", seed)?),
        None => unseal(path, &fields, passphrase.ok_or_else(|| KeyFileError::Sealed { path: path.to_owned() })?)?,
    };
    let keypair = Keypair::from_seed(&seed);
    if fields.get("peer").copied() != Some(keypair.peer_id().to_string().as_str()) {
        return Err(damaged(path, "the key is not that of the peer it names"));
    }
    Ok(keypair)
}

/// Reads a key file, or makes it if there is none.
///
/// # Errors
/// [`KeyFileError`].
pub fn load_or_create_key(path: &Path, passphrase: Option<&str>) -> Result<Keypair, KeyFileError> {
    match load_key(path, passphrase) {
        Err(KeyFileError::Missing { .. }) => match create_key(path, passphrase) {
            // Another process made it in between.
            Err(KeyFileError::Exists { .. }) => load_key(path, passphrase),
            other => other,
        },
        other => other,
    }
}

/// Whether a key file needs a passphrase.
///
/// # Errors
/// [`KeyFileError`].
pub fn key_is_sealed(path: &Path) -> Result<bool, KeyFileError> {
    Ok(!parse(path, &read(path)?)?.contains_key("seed"))
}

fn read(path: &Path) -> Result<Zeroizing<String>, KeyFileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing { path: path.to_owned() },
        _ => KeyFileError::Io { what: "read", path: path.to_owned(), source },
    };
    let mut file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE as u64 {
        return Err(damaged(path, "it is no key file"));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE));
    (&mut file).take(MAX_FILE as u64).read_to_end(&mut bytes).map_err(failed)?;
    let text = std::str::from_utf8(&bytes).map_err(|_| damaged(path, "it is not text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// The fields by name, after the check line and the title have been verified.
fn parse<'t>(path: &Path, text: &'t str) -> Result<HashMap<&'t str, &'t str>, KeyFileError> {
    let (body, check) = text.rsplit_once("check ").ok_or_else(|| damaged(path, "its check line is missing"))?;
    if check.trim_end() != checksum(body) {
        return Err(damaged(path, "its check line does not match"));
    }
    let mut lines = body.lines();
    match lines.next() {
        Some(TITLE) => {}
        Some(other) if other.starts_with("willcall-key ") => {
            return Err(damaged(path, "it was written by a newer version of this program"));
        }
        _ => return Err(damaged(path, "it is no key file")),
    }
    lines.map(|line| line.split_once(' ').ok_or_else(|| damaged(path, "a line has no value"))).collect()
}

fn open_text(keypair: &Keypair) -> Zeroizing<String> {
    let seed = Zeroizing::new(HEXLOWER.encode(keypair.seed().as_ref()));
    with_check(Zeroizing::new(format!("{TITLE}\npeer {}\nseed {}\n", keypair.peer_id(), *seed)))
}

fn sealed_text(path: &Path, keypair: &Keypair, passphrase: &str) -> Result<Zeroizing<String>, KeyFileError> {
    let (mut salt, mut nonce) = ([0; 16], [0; 12]);
    random(path, &mut salt)?;
    random(path, &mut nonce)?;
    let head = sealed_head(&keypair.peer_id().to_string(), &kdf_text(KDF), &HEXLOWER.encode(&salt));
    let key = derive(path, passphrase, &salt, KDF)?;
    let mut sealed = Zeroizing::new(keypair.seed().to_vec());
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(head.as_bytes()), &mut *sealed)
        .map_err(|_| crypto(path, "sealing failed"))?;
    let (nonce, sealed) = (HEXLOWER.encode(&nonce), HEXLOWER.encode(&sealed));
    Ok(with_check(Zeroizing::new(format!("{head}nonce {nonce}\nbox {sealed}\n"))))
}

fn unseal(path: &Path, fields: &HashMap<&str, &str>, passphrase: &str) -> Result<Zeroizing<[u8; 32]>, KeyFileError> {
    let field =
        |name: &str| fields.get(name).copied().ok_or_else(|| damaged(path, &format!("its {name} line is missing")));
    let (peer, kdf, salt) = (field("peer")?, field("kdf")?, field("salt")?);
    let costs = parse_kdf(kdf).ok_or_else(|| damaged(path, "its kdf line is not one this program uses"))?;
    let key = derive(path, passphrase, &fixed::<16>(path, "salt", salt)?, costs)?;
    let nonce = Nonce::assume_unique_for_key(fixed::<12>(path, "nonce", field("nonce")?)?);
    let mut sealed = Zeroizing::new(fixed::<48>(path, "box", field("box")?)?.to_vec());
    let head = sealed_head(peer, kdf, salt);
    let seed = key
        .open_in_place(nonce, Aad::from(head.as_bytes()), &mut sealed)
        .map_err(|_| KeyFileError::WrongPassphrase { path: path.to_owned() })?;
    let seed: &[u8; 32] = (&*seed).try_into().map_err(|_| damaged(path, "its box has the wrong length"))?;
    Ok(Zeroizing::new(*seed))
}

fn sealed_head(peer: &str, kdf: &str, salt: &str) -> String {
    format!("{TITLE}\npeer {peer}\nkdf {kdf}\nsalt {salt}\n")
}

fn kdf_text((memory, passes, lanes): (u32, u32, u32)) -> String {
    format!("argon2id m={memory} t={passes} p={lanes}")
}

fn parse_kdf(text: &str) -> Option<(u32, u32, u32)> {
    let mut parts = text.split(' ');
    if parts.next() != Some("argon2id") {
        return None;
    }
    let mut cost = |name: &str, max: u32| {
        let value: u32 = parts.next()?.strip_prefix(name)?.parse().ok()?;
        (value <= max).then_some(value)
    };
    Some((cost("m=", KDF_MAX.0)?, cost("t=", KDF_MAX.1)?, cost("p=", KDF_MAX.2)?))
}

fn derive(
    path: &Path,
    passphrase: &str,
    salt: &[u8; 16],
    (memory, passes, lanes): (u32, u32, u32),
) -> Result<LessSafeKey, KeyFileError> {
    let params = Params::new(memory, passes, lanes, Some(32)).map_err(|error| crypto(path, &error.to_string()))?;
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase.as_bytes(), salt, key.as_mut())
        .map_err(|error| crypto(path, &error.to_string()))?;
    let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).map_err(|_| crypto(path, "the derived key is unusable"))?;
    Ok(LessSafeKey::new(key))
}

fn checksum(body: &str) -> String {
    let hash = digest(&SHA256, body.as_bytes());
    HEXLOWER.encode(hash.as_ref().get(..8).unwrap_or_default())
}

fn with_check(body: Zeroizing<String>) -> Zeroizing<String> {
    Zeroizing::new(format!("{}check {}\n", *body, checksum(&body)))
}

fn fixed<const N: usize>(path: &Path, name: &str, hex: &str) -> Result<[u8; N], KeyFileError> {
    let bytes = HEXLOWER.decode(hex.as_bytes()).ok().map(Zeroizing::new);
    bytes
        .and_then(|bytes| bytes.as_slice().try_into().ok())
        .ok_or_else(|| damaged(path, &format!("its {name} line is malformed")))
}

/// Writes the whole file under another name, then gives it its name in one step that fails if the name is taken.
fn write_new(path: &Path, text: &str) -> Result<(), KeyFileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists { path: path.to_owned() },
        _ => KeyFileError::Io { what: "write", path: path.to_owned(), source },
    };
    if fs::symlink_metadata(path).is_ok() {
        return Err(KeyFileError::Exists { path: path.to_owned() });
    }
    let mut suffix = [0; 8];
    random(path, &mut suffix)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", HEXLOWER.encode(&suffix)));
    let temporary = path.with_file_name(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::hard_link(&temporary, path)
    })();
    // Nothing else bears this name; if it cannot be removed it is a private file of the same user.
    let _ = fs::remove_file(&temporary);
    written.map_err(failed)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

fn random(path: &Path, bytes: &mut [u8]) -> Result<(), KeyFileError> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| crypto(path, "the system gives no random bytes"))
}

fn damaged(path: &Path, reason: &str) -> KeyFileError {
    KeyFileError::Damaged { path: path.to_owned(), reason: reason.to_owned() }
}

fn crypto(path: &Path, reason: &str) -> KeyFileError {
    KeyFileError::Crypto { path: path.to_owned(), reason: reason.to_owned() }
}
