//! What the two primitives of publishing cost on one thread, for a file's bytes: the measure that `scripts/bench-publish.sh`
//! holds publishing against. Prints seconds as JSON.

#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use willcall_protocol::ContentId;
use willcall_protocol::cipher::{ContentSecret, FrameCipher};
use willcall_protocol::manifest::DEFAULT_CHUNK_SIZE;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: primitives FILE")?;
    let mut file = File::open(path)?;
    let secret = ContentSecret::from_bytes([1; 32]);
    let cipher = FrameCipher::new(&secret, ContentId::from_bytes([2; 16]), u32::MAX).ok_or("no cipher")?;
    let (mut hashing, mut sealing) = (Duration::ZERO, Duration::ZERO);
    let mut hasher = blake3::Hasher::new();
    let mut piece = Vec::new();
    for frame in 0.. {
        piece.clear();
        if (&mut file).take(u64::from(DEFAULT_CHUNK_SIZE)).read_to_end(&mut piece)? == 0 {
            break;
        }
        let began = Instant::now();
        hasher.update(&piece);
        hashing += began.elapsed();
        let began = Instant::now();
        cipher.seal(frame, &mut piece)?;
        sealing += began.elapsed();
    }
    std::hint::black_box(hasher.finalize());
    println!("{{\"blake3_s\": {:.4}, \"aes_256_gcm_s\": {:.4}}}", hashing.as_secs_f64(), sealing.as_secs_f64());
    Ok(())
}
