//! Voucher codes as people type them: 128 random bits in base 32 without the letters that are mistaken for digits, in
//! groups, with a check character that tells a typing error from a code that does not exist.

use std::fmt;
use std::str::FromStr;

/// Crockford's base 32: no I, L, O, U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// 26 characters hold 130 bits.
const CHARACTERS: usize = 26;
const GROUP: usize = 4;

/// A voucher code. It is money: it is shown once, when it is issued, and never stored.
#[derive(Clone, PartialEq, Eq)]
pub struct VoucherCode([u8; 16]);

/// Why text is no voucher code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// Too long or too short.
    #[error("a voucher code has 27 letters and digits, this has {0}; check that it is whole")]
    Length(usize),
    /// A character that is in no code.
    #[error("a voucher code has letters and digits only, without U; '{}' does not belong there", .0.escape_default())]
    Character(char),
    /// The check character does not fit.
    #[error("the voucher code is mistyped: its last character does not fit the others")]
    Check,
}

impl VoucherCode {
    /// From 16 random bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        VoucherCode(bytes)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    fn digits(&self) -> [u8; CHARACTERS] {
        // 130 bits, the lowest two of them zero.
        let number = u128::from_be_bytes(self.0);
        let mut digits = [0; CHARACTERS];
        for (i, digit) in digits.iter_mut().enumerate() {
            let shift = 123 - 5 * i64::try_from(i).unwrap_or_default();
            let bits = if shift >= 0 { number >> shift } else { number << -shift };
            *digit = u8::try_from(bits & 31).unwrap_or_default();
        }
        digits
    }
}

/// Luhn's check over base 32: finds every single wrong character and nearly every swap of neighbours.
fn check_digit(digits: &[u8]) -> u8 {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, digit)| {
            let value = u32::from(*digit) * if i % 2 == 0 { 2 } else { 1 };
            value / 32 + value % 32
        })
        .sum();
    u8::try_from((32 - sum % 32) % 32).unwrap_or_default()
}

fn letter(digit: u8) -> char {
    ALPHABET.get(usize::from(digit)).copied().map_or('?', char::from)
}

impl fmt::Display for VoucherCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.digits();
        for (i, digit) in digits.iter().chain([&check_digit(&digits)]).enumerate() {
            if i > 0 && i % GROUP == 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", letter(*digit))?;
        }
        Ok(())
    }
}

impl fmt::Debug for VoucherCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VoucherCode(…)")
    }
}

impl FromStr for VoucherCode {
    type Err = CodeError;

    fn from_str(text: &str) -> Result<Self, CodeError> {
        let mut digits = Vec::with_capacity(CHARACTERS + 1);
        let mut count = 0usize;
        for character in text.chars().filter(|c| *c != '-' && !c.is_whitespace()) {
            count += 1;
            if count > CHARACTERS + 1 {
                continue;
            }
            let upper = match character.to_ascii_uppercase() {
                'I' | 'L' => '1',
                'O' => '0',
                other => other,
            };
            let place = ALPHABET.iter().position(|a| char::from(*a) == upper).and_then(|n| u8::try_from(n).ok());
            digits.push(place.ok_or(CodeError::Character(character))?);
        }
        let Some((check, body)) = digits.split_last().filter(|_| count == CHARACTERS + 1) else {
            return Err(CodeError::Length(count));
        };
        let number = body.iter().take(CHARACTERS - 1).fold(0u128, |sum, digit| (sum << 5) | u128::from(*digit));
        let last = body.last().copied().unwrap_or_default();
        // The last character carries three bits; the other two are zero in every code that was issued.
        if check_digit(body) != *check || last & 3 != 0 {
            return Err(CodeError::Check);
        }
        Ok(VoucherCode(((number << 3) | u128::from(last >> 2)).to_be_bytes()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_survive_typing(bytes: [u8; 16]) {
            let code = VoucherCode::from_bytes(bytes);
            let text = code.to_string();
            prop_assert_eq!(text.len(), 33);
            prop_assert_eq!(&text.parse::<VoucherCode>().unwrap(), &code);
            let sloppy = text.to_lowercase().replace('-', " ").replace('1', "l").replace('0', "o");
            prop_assert_eq!(&sloppy.parse::<VoucherCode>().unwrap(), &code);
        }

        #[test]
        fn one_wrong_character_is_noticed(bytes: [u8; 16], at in 0usize..33, with in 0usize..32) {
            let mut text = VoucherCode::from_bytes(bytes).to_string().into_bytes();
            let wrong = ALPHABET[with];
            prop_assume!(text[at] != b'-' && text[at] != wrong);
            text[at] = wrong;
            prop_assert_eq!(String::from_utf8(text).unwrap().parse::<VoucherCode>(), Err(CodeError::Check));
        }
    }

    #[test]
    fn other_text_is_refused_by_name() {
        assert_eq!("".parse::<VoucherCode>(), Err(CodeError::Length(0)));
        assert_eq!("A".repeat(5000).parse::<VoucherCode>(), Err(CodeError::Length(5000)));
        assert_eq!("ABC\u{7}".parse::<VoucherCode>(), Err(CodeError::Character('\u{7}')));
        assert_eq!(format!("{:?}", VoucherCode::from_bytes([7; 16])), "VoucherCode(…)");
    }
}
