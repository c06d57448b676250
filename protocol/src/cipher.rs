//! Encryption of content in frames of one chunk. A frame authenticates its place and the frame count, so that chunks
//! cannot be swapped, dropped or taken from another publication; the last frame is marked (STREAM construction,
//! Hoang, Reyhanitabar, Rogaway and Vizár 2015).

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::ids::{ContentId, Digest};

/// Bytes that encryption adds to each frame: the tag, inside the frame.
pub const TAG_LEN: usize = 16;

/// The 256-bit secret of one publication: random, never reused, wiped when dropped.
#[derive(Clone)]
pub struct ContentSecret(Zeroizing<[u8; 32]>);

impl ContentSecret {
    /// From 32 random or stored bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        ContentSecret(Zeroizing::new(bytes))
    }

    /// A fresh one.
    pub fn generate(rng: &mut impl rand_core::CryptoRng) -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        rng.fill_bytes(bytes.as_mut());
        ContentSecret(bytes)
    }

    /// The bytes, to be sealed or stored at the manager.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What the manifest holds of it: says nothing of the key, and no second key has the same.
    pub fn commitment(&self) -> Digest {
        Digest::from_bytes(blake3::derive_key("willcall 2026-11 key commitment", self.0.as_ref()))
    }
}

impl std::fmt::Debug for ContentSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ContentSecret(…)")
    }
}

/// A frame that could not be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CipherError {
    /// Not encrypted under this secret at this place, or changed.
    #[error("frame {0} does not authenticate")]
    Open(u32),
    /// The cipher failed.
    #[error("frame {0} could not be encrypted")]
    Seal(u32),
}

/// Seals and opens the frames of one content.
pub struct FrameCipher {
    key: LessSafeKey,
    content: ContentId,
    frames: u32,
}

impl FrameCipher {
    /// The cipher of a content of `frames` frames. `None` if the cipher library refuses the key, which has the right
    /// length by its type.
    pub fn new(secret: &ContentSecret, content: ContentId, frames: u32) -> Option<Self> {
        let key = Zeroizing::new(blake3::derive_key("willcall 2026-11 content encryption key", secret.0.as_ref()));
        let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).ok()?;
        Some(FrameCipher { key: LessSafeKey::new(key), content, frames })
    }

    fn nonce(&self, frame: u32) -> Nonce {
        let mut nonce = [0u8; 12];
        let (number, rest) = nonce.split_at_mut(8);
        number.copy_from_slice(&u64::from(frame).to_be_bytes());
        if let (Some(last), true) = (rest.last_mut(), frame.checked_add(1) == Some(self.frames)) {
            *last = 1;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    fn additional_data(&self, frame: u32) -> Aad<[u8; 24]> {
        let mut data = [0u8; 24];
        let (content, numbers) = data.split_at_mut(16);
        let (number, count) = numbers.split_at_mut(4);
        content.copy_from_slice(self.content.as_bytes());
        number.copy_from_slice(&frame.to_be_bytes());
        count.copy_from_slice(&self.frames.to_be_bytes());
        Aad::from(data)
    }

    /// Encrypts `buffer` in place and appends the tag.
    ///
    /// # Errors
    /// [`CipherError::Seal`].
    pub fn seal(&self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), CipherError> {
        let tag = self
            .key
            .seal_in_place_separate_tag(self.nonce(frame), self.additional_data(frame), buffer)
            .map_err(|_| CipherError::Seal(frame))?;
        buffer.extend_from_slice(tag.as_ref());
        Ok(())
    }

    /// Decrypts `buffer` in place; returns the plaintext within it.
    ///
    /// # Errors
    /// [`CipherError::Open`], in which case the buffer's content is not to be used.
    pub fn open<'a>(&self, frame: u32, buffer: &'a mut [u8]) -> Result<&'a [u8], CipherError> {
        self.key
            .open_in_place(self.nonce(frame), self.additional_data(frame), buffer)
            .map(|plain| &*plain)
            .map_err(|_| CipherError::Open(frame))
    }

    /// Decrypts `sealed` into `open`, replacing what is in it; `sealed` stays as it is.
    ///
    /// # Errors
    /// [`CipherError::Open`], in which case what is in `open` is not to be used.
    pub fn open_into(&self, frame: u32, sealed: &[u8], open: &mut Vec<u8>) -> Result<(), CipherError> {
        let (text, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(CipherError::Open(frame))?;
        open.resize(text.len(), 0);
        self.key
            .open_separate_gather(self.nonce(frame), self.additional_data(frame), text, tag, open)
            .map_err(|_| CipherError::Open(frame))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn cipher(frames: u32, content: u8) -> FrameCipher {
        FrameCipher::new(&ContentSecret::from_bytes([3; 32]), ContentId::from_bytes([content; 16]), frames).unwrap()
    }

    #[test]
    fn a_frame_opens_only_at_its_own_place_and_count() {
        let mut frame = b"some plain text".to_vec();
        cipher(3, 1).seal(1, &mut frame).unwrap();
        assert_eq!(frame.len(), 15 + TAG_LEN);
        assert_eq!(cipher(3, 1).open(1, &mut frame.clone()).unwrap(), b"some plain text");
        let mut open = vec![9; 100];
        cipher(3, 1).open_into(1, &frame, &mut open).unwrap();
        assert_eq!(open, b"some plain text");
        assert_eq!(cipher(3, 1).open_into(0, &frame, &mut open), Err(CipherError::Open(0)));
        assert_eq!(cipher(3, 1).open_into(1, &frame[..TAG_LEN - 1], &mut open), Err(CipherError::Open(1)));
        assert_eq!(cipher(3, 1).open(0, &mut frame.clone()), Err(CipherError::Open(0)));
        assert!(cipher(2, 1).open(1, &mut frame.clone()).is_err());
        assert!(cipher(3, 2).open(1, &mut frame.clone()).is_err());
        frame[0] ^= 1;
        assert!(cipher(3, 1).open(1, &mut frame).is_err());
    }
}
