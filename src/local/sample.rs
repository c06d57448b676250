//! What the demo sells when it is given nothing: a small album of tones that any player plays, a booklet, a cover and a
//! bonus folder, made on the spot so that nothing has to be shipped or downloaded.

use std::f64::consts::TAU;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const RATE: u32 = 44_100;

/// Writes the album below `dir` and returns its folder.
pub(crate) fn album(dir: &Path) -> io::Result<PathBuf> {
    let root = dir.join("Tones for a Will Call Window");
    fs::create_dir_all(root.join("bonus"))?;
    let tracks: [(&str, &[f64], u32); 4] = [
        ("01 - First in Line.wav", &[220.0, 277.2, 329.6], 9),
        ("02 - Names at the Door.wav", &[246.9, 311.1, 370.0, 493.9], 11),
        ("03 - Encore for One.wav", &[196.0, 246.9, 293.7], 8),
        ("bonus/04 - Lights Up (demo take).wav", &[261.6, 392.0], 5),
    ];
    for (name, notes, seconds) in tracks {
        fs::write(root.join(name), wav(notes, seconds)?)?;
    }
    fs::write(root.join("cover.bmp"), bitmap(256)?)?;
    fs::write(root.join("booklet.txt"), BOOKLET)?;
    Ok(root)
}

const BOOKLET: &str = "Tones for a Will Call Window\n\n\
    1  First in Line\n2  Names at the Door\n3  Encore for One\n4  Lights Up (demo take)\n\n\
    At the will call window a paid ticket waits for one named person.\n";

/// PCM, 16 bit, stereo: arpeggios of sine tones that fade out.
fn wav(notes: &[f64], seconds: u32) -> io::Result<Vec<u8>> {
    let frames = RATE * seconds;
    let data_len = frames * 4;
    let mut out = Vec::with_capacity(data_len as usize + 44);
    out.write_all(b"RIFF")?;
    out.write_all(&(36 + data_len).to_le_bytes())?;
    out.write_all(b"WAVEfmt ")?;
    out.write_all(&16u32.to_le_bytes())?; // length of this part
    out.write_all(&1u16.to_le_bytes())?; // PCM
    out.write_all(&2u16.to_le_bytes())?; // channels
    out.write_all(&RATE.to_le_bytes())?;
    out.write_all(&(RATE * 4).to_le_bytes())?; // bytes a second
    out.write_all(&4u16.to_le_bytes())?; // bytes a frame
    out.write_all(&16u16.to_le_bytes())?; // bits a sample
    out.write_all(b"data")?;
    out.write_all(&data_len.to_le_bytes())?;
    for frame in 0..frames {
        let t = f64::from(frame) / f64::from(RATE);
        let note = notes.iter().cycle().nth((frame / (RATE / 2)) as usize).copied().unwrap_or(220.0);
        let fade = 1.0 - (t * 2.0).fract();
        for detune in [1.0, 1.003] {
            let value = (t * note * detune * TAU).sin() * fade * 0.4;
            #[expect(clippy::cast_possible_truncation, reason = "a sine of at most 0.4 of the range")]
            let sample = (value * f64::from(i16::MAX)) as i16;
            out.write_all(&sample.to_le_bytes())?;
        }
    }
    Ok(out)
}

/// An uncompressed 24-bit Windows bitmap: rings in two colours.
fn bitmap(side: u32) -> io::Result<Vec<u8>> {
    let data_len = side * side * 3; // a multiple of four a row for even sides
    let mut out = Vec::with_capacity(data_len as usize + 54);
    out.write_all(b"BM")?;
    out.write_all(&(54 + data_len).to_le_bytes())?;
    out.write_all(&[0; 4])?;
    out.write_all(&54u32.to_le_bytes())?; // where the pixels begin
    out.write_all(&40u32.to_le_bytes())?; // length of this header
    out.write_all(&side.to_le_bytes())?;
    out.write_all(&side.to_le_bytes())?;
    out.write_all(&1u16.to_le_bytes())?; // planes
    out.write_all(&24u16.to_le_bytes())?; // bits a pixel
    out.write_all(&[0; 24])?; // no compression, defaults
    for y in 0..side {
        for x in 0..side {
            let (dx, dy) = (x.abs_diff(side / 2), y.abs_diff(side / 2));
            let ring = ((dx * dx + dy * dy) / 700).is_multiple_of(2);
            out.write_all(if ring { &[70, 40, 200] } else { &[230, 220, 250] })?;
        }
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn files_are_what_their_headers_say() {
        let wav = wav(&[440.0], 1).unwrap();
        assert_eq!(&wav[..4], b"RIFF");
        assert_eq!(u32::from_le_bytes(wav[4..8].try_into().unwrap()) as usize, wav.len() - 8);
        assert_eq!(u32::from_le_bytes(wav[40..44].try_into().unwrap()) as usize, wav.len() - 44);
        let bmp = bitmap(256).unwrap();
        assert_eq!(u32::from_le_bytes(bmp[2..6].try_into().unwrap()) as usize, bmp.len());
    }
}
