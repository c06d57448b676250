//! Key files: not over another, not where others can read, not from a damaged copy.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use node::{KeyFileError, create_key, key_is_sealed, load_key, load_or_create_key, save_key};
use protocol::Keypair;

#[test]
fn a_key_survives_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    let made = load_or_create_key(&path, None).unwrap();
    assert_eq!(load_or_create_key(&path, None).unwrap().peer_id(), made.peer_id());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert!(!key_is_sealed(&path).unwrap());
    // Only the key itself is left in the directory.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_existing_key_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    let first = create_key(&path, None).unwrap();
    let error = save_key(&path, &Keypair::from_seed(&[1; 32]), None).unwrap_err();
    assert!(matches!(error, KeyFileError::Exists { .. }), "{error}");
    assert_eq!(load_key(&path, None).unwrap().peer_id(), first.peer_id());
}

#[test]
fn a_file_that_others_can_read_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    create_key(&path, None).unwrap();
    for mode in [0o644, 0o640, 0o604, 0o660] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let text = load_key(&path, None).unwrap_err().to_string();
        let path = path.display();
        assert_eq!(text, format!("key file {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"));
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    load_key(&path, None).unwrap();
}

#[test]
fn a_sealed_key_opens_with_its_passphrase_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    let keypair = Keypair::from_seed(&[9; 32]);
    save_key(&path, &keypair, Some("correct horse")).unwrap();
    assert!(key_is_sealed(&path).unwrap());
    assert!(matches!(load_key(&path, None).unwrap_err(), KeyFileError::Sealed { .. }));
    assert!(matches!(load_key(&path, Some("wrong")).unwrap_err(), KeyFileError::WrongPassphrase { .. }));
    assert_eq!(load_key(&path, Some("correct horse")).unwrap().seed(), keypair.seed());
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("seed"), "{text}");
}

#[test]
fn any_change_to_a_file_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    assert!(matches!(load_key(&path, None).unwrap_err(), KeyFileError::Missing { .. }));
    create_key(&path, None).unwrap();
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        // The line end after the check is the one byte that carries nothing.
        if let Err(error) = load_key(&path, None) {
            assert!(matches!(error, KeyFileError::Damaged { .. }), "byte {at}: {error}");
        } else {
            assert_eq!(at, good.len() - 1, "byte {at}");
        }
    }
    for end in 0..good.len() - 1 {
        fs::write(&path, &good[..end]).unwrap();
        let error = load_key(&path, None).unwrap_err();
        assert!(matches!(error, KeyFileError::Damaged { .. }), "cut at {end}: {error}");
    }
}
