//! Money as integers. An amount is a count of minor units (cents) of an ISO 4217 currency; rates, which are smaller
//! than a minor unit, are counted in millionths of one. There is no floating point and no silent wrap-around.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};

/// Millionths of a minor unit in one minor unit.
pub const MICROS: u64 = 1_000_000;

/// Text that is no amount or no currency.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// Not three capital letters.
    #[error("'{0}' is no ISO 4217 currency code; three capital letters are expected, such as USD")]
    Currency(String),
    /// Not a decimal number, or with more decimals than the currency has.
    #[error("'{text}' is no amount of {currency}: {why}")]
    Number {
        /// What was given.
        text: String,
        /// The currency it was read for.
        currency: Currency,
        /// What is wrong.
        why: &'static str,
    },
}

/// An ISO 4217 currency code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode)]
pub struct Currency([u8; 3]);

impl Currency {
    /// US dollar: what examples and tests use.
    pub const USD: Currency = Currency(*b"USD");

    /// The code's three letters.
    pub fn as_str(&self) -> &str {
        // Only ASCII capitals get in.
        std::str::from_utf8(&self.0).unwrap_or("???")
    }

    /// Number of decimals between the major and the minor unit (ISO 4217 table A.1; two where the table says nothing else).
    pub fn exponent(&self) -> u32 {
        match &self.0 {
            b"BIF" | b"CLP" | b"DJF" | b"GNF" | b"ISK" | b"JPY" | b"KMF" | b"KRW" | b"PYG" | b"RWF" | b"UGX"
            | b"UYI" | b"VND" | b"VUV" | b"XAF" | b"XOF" | b"XPF" => 0,
            b"BHD" | b"IQD" | b"JOD" | b"KWD" | b"LYD" | b"OMR" | b"TND" => 3,
            b"CLF" | b"UYW" => 4,
            _ => 2,
        }
    }
}

impl FromStr for Currency {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        match text.as_bytes() {
            [a, b, c] if [a, b, c].iter().all(|l| l.is_ascii_uppercase()) => Ok(Currency([*a, *b, *c])),
            _ => Err(AmountError::Currency(text.chars().take(16).collect())),
        }
    }
}

impl<C> Decode<C> for Currency {
    fn decode<D: bincode::de::Decoder<Context = C>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let code = <[u8; 3]>::decode(decoder)?;
        if code.iter().all(u8::is_ascii_uppercase) {
            Ok(Currency(code))
        } else {
            Err(bincode::error::DecodeError::Other("not an ISO 4217 currency code"))
        }
    }
}

bincode::impl_borrow_decode!(Currency);

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl serde::Serialize for Currency {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for Currency {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An amount of money, never negative. JSON: `{"minor": 999, "currency": "USD"}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode, serde::Serialize, serde::Deserialize)]
pub struct Amount {
    /// Count of minor units.
    pub minor: u64,
    /// What they are units of.
    pub currency: Currency,
}

impl Amount {
    /// Most minor units in one amount: far above any sale, and low enough that sums of a million of them and their
    /// millionths stay within 64 and 128 bits.
    pub const MAX_MINOR: u64 = 1_000_000_000_000;

    /// Reads a decimal number such as `9.99` in a currency's major unit.
    ///
    /// # Errors
    /// [`AmountError`] when it is no plain decimal number, has more decimals than the currency, or is too large.
    pub fn parse(text: &str, currency: Currency) -> Result<Self, AmountError> {
        let fail = |why| AmountError::Number { text: text.chars().take(32).collect(), currency, why };
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) || text.ends_with('.')
        {
            return Err(fail("a plain decimal number is expected, such as 9.99"));
        }
        let decimals = currency.exponent() as usize;
        if fraction.len() > decimals {
            return Err(fail("it has more decimals than the currency"));
        }
        let digits = format!("{whole}{fraction:0<decimals$}");
        match digits.parse::<u64>() {
            Ok(minor) if minor <= Self::MAX_MINOR => Ok(Amount { minor, currency }),
            _ => Err(fail("it is too large")),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.currency.exponent() {
            0 => write!(f, "{} {}", self.minor, self.currency),
            e => {
                let unit = 10u64.pow(e);
                let width = e as usize;
                write!(f, "{}.{:0width$} {}", self.minor / unit, self.minor % unit, self.currency)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn decimals_follow_the_currency() {
        let cases = [
            ("9.99", "USD", 999),
            ("9.9", "USD", 990),
            ("9", "USD", 900),
            ("9", "JPY", 9),
            ("1.234", "KWD", 1234),
            ("0", "USD", 0),
        ];
        for (text, currency, minor) in cases {
            let amount = Amount::parse(text, currency.parse().unwrap()).unwrap();
            assert_eq!(amount.minor, minor, "{text} {currency}");
        }
        assert_eq!(Amount::parse("9.9", Currency::USD).unwrap().to_string(), "9.90 USD");
        for bad in ["", ".", "1.", ".5", "-1", "1e3", "9.999", "1,5", "99999999999999999999", " 1"] {
            assert!(Amount::parse(bad, Currency::USD).is_err(), "{bad}");
        }
        assert!("usd".parse::<Currency>().is_err());
        assert!(Amount::parse("1.5", "JPY".parse().unwrap()).is_err());
    }
}
