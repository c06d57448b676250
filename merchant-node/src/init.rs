//! Making a merchant's folder: the key first and the configuration last, so that a folder with a configuration is
//! whole, and one without can be tried again.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use node::KeyFileError;
use protocol::trust::{InvitedRole, JoinLine};
use protocol::{Address, PeerId};

use crate::config::{self, Config, ConfigError};

/// File name of the node's key in the merchant's folder.
pub(crate) const KEY: &str = "key";

/// What to make.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The line from the manager's operator; it must carry an invitation for a merchant.
    pub join: JoinLine,
    /// The shop's name, 1 to 64 bytes.
    pub name: String,
    /// Where to listen for other nodes; empty for nowhere.
    pub listen: Vec<Address>,
    /// Addresses to announce; empty for the ones listened on.
    pub external: Vec<Address>,
    /// Where to serve the HTTP API; `None` for `127.0.0.1:4680`.
    pub http: Option<SocketAddr>,
}

impl InitOptions {
    /// The usual merchant: listens nowhere, HTTP on the default port.
    pub fn new(join: JoinLine, name: impl Into<String>) -> Self {
        InitOptions { join, name: name.into(), listen: Vec::new(), external: Vec::new(), http: None }
    }
}

/// What was made.
#[derive(Clone, Debug)]
pub struct InitReport {
    /// The merchant's peer ID.
    pub peer: PeerId,
    /// The folder.
    pub dir: PathBuf,
    /// The configuration written.
    pub config: Config,
}

/// Why no merchant was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The folder is taken.
    #[error("{} already holds a merchant or another node; use run, or choose another --dir", dir.display())]
    Exists {
        /// The folder.
        dir: PathBuf,
    },
    /// The join line does not let a merchant in.
    #[error(
        "the join line carries no invitation for a merchant; ask the manager's operator for the line that \
         `willcall manager invite merchant` prints"
    )]
    NoInvitation,
    /// A value that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The key file.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The system does not let us.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Makes a merchant in `dir`: the folder (mode 0700), a key and `config.toml` (both mode 0600, the latter holds the
/// invitation). Blocks for a few file operations.
///
/// # Errors
/// [`InitError`]; what was there before stays as it was.
pub fn init(dir: &Path, options: InitOptions) -> Result<InitReport, InitError> {
    if options.join.invitation.as_ref().is_none_or(|invitation| invitation.role != InvitedRole::Merchant) {
        return Err(InitError::NoInvitation);
    }
    let mut config = Config::new(&options.join, options.name);
    config.listen = options.listen;
    config.external = options.external;
    config.http = options.http.unwrap_or(config.http);
    config.check()?;

    let path = dir.join(config::FILE);
    if path.exists() {
        return Err(InitError::Exists { dir: dir.to_owned() });
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| InitError::Io { path, source }
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(failed(dir))?;
    let keypair = node::load_or_create_key(&dir.join(KEY), None)?;

    let text = toml::to_string(&config)
        .map_err(|error| ConfigError::Toml { path: path.clone(), message: error.to_string() })?;
    let text = format!("# A Willcall merchant. Times are in milliseconds; every key has a default.\n{text}");
    write_whole(dir, &path, text.as_bytes()).map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => InitError::Exists { dir: dir.to_owned() },
        _ => InitError::Io { path, source },
    })?;
    Ok(InitReport { peer: keypair.peer_id(), dir: dir.to_owned(), config })
}

/// Writes a new file, whole or not at all, readable by its owner only.
fn write_whole(dir: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = dir.join(format!("{}.new", config::FILE));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    // Unlike a rename, a link does not replace what another process made in between.
    let linked = std::fs::hard_link(&temporary, path);
    std::fs::remove_file(&temporary)?;
    linked?;
    std::fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use protocol::trust::Invitation;
    use protocol::{Keypair, Nonce, PeerAddrs};

    fn line(role: Option<InvitedRole>) -> JoinLine {
        let peer = Keypair::from_seed(&[1; 32]).peer_id();
        JoinLine {
            root: Keypair::from_seed(&[2; 32]).peer_id(),
            managers: vec![PeerAddrs::new(peer, vec![Address::new("/ip4/127.0.0.1/tcp/9").unwrap()])],
            invitation: role.map(|role| Invitation { role, token: Nonce::from_bytes([3; 16]) }),
        }
    }

    #[test]
    fn a_folder_is_made_once_and_closed_to_others() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("shop");
        let made = init(&dir, InitOptions::new(line(Some(InvitedRole::Merchant)), "shop")).unwrap();
        let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(""), mode(KEY), mode(config::FILE)), (0o700, 0o600, 0o600));
        assert_eq!(Config::load(&dir).unwrap(), made.config);
        let again = init(&dir, InitOptions::new(line(Some(InvitedRole::Merchant)), "shop")).unwrap_err();
        assert!(again.to_string().contains("use run, or choose another --dir"), "{again}");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
    }

    #[test]
    fn lines_without_a_merchants_invitation_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        for role in [None, Some(InvitedRole::Seeder)] {
            let dir = parent.path().join("shop");
            let error = init(&dir, InitOptions::new(line(role), "shop")).unwrap_err();
            assert!(matches!(error, InitError::NoInvitation));
            assert!(!dir.exists());
        }
    }
}
