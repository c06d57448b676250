//! What a delivery may cost, in one place, so that the check at publishing and the split at a sale cannot differ.

use protocol::Amount;
use protocol::amount::MICROS;

/// Most that is paid for delivering `bytes` once: millionths of the minor unit, at `rate` millionths per MiB, with
/// `slack` millionths on top for chunks that are fetched twice. Rounded up; caps at `u64::MAX`.
pub(crate) fn ceiling_micros(rate: u64, bytes: u64, slack: u32) -> u64 {
    let micros = (u128::from(rate) * u128::from(bytes)).div_ceil(1 << 20);
    let with_slack = micros.saturating_mul(1_000_000 + u128::from(slack)).div_ceil(1_000_000);
    u64::try_from(with_slack).unwrap_or(u64::MAX)
}

/// A millionth part of a price in minor units, rounded down.
pub(crate) fn part_of(price: Amount, millionths: u32) -> u64 {
    let part = u128::from(price.minor) * u128::from(millionths) / 1_000_000;
    u64::try_from(part).unwrap_or(u64::MAX)
}

/// Checks that a price leaves enough for delivery after the rights holders' and the network's parts.
///
/// # Errors
/// A line with the figures and what to change.
pub(crate) fn check_split(
    price: Amount,
    shares: &[(String, u32)],
    fee_millionths: u32,
    ceiling_micros: u64,
) -> Result<(), String> {
    let total: u64 = shares.iter().map(|(_, part)| u64::from(*part)).sum::<u64>() + u64::from(fee_millionths);
    if total > 1_000_000 {
        return Err(format!(
            "the shares and the network's fee of {} % come to more than the whole price",
            percent(u64::from(fee_millionths))
        ));
    }
    let taken: u64 = shares.iter().map(|(_, part)| part_of(price, *part)).sum::<u64>() + part_of(price, fee_millionths);
    let left = price.minor.saturating_sub(taken);
    let delivery = ceiling_micros.div_ceil(MICROS);
    if delivery > left {
        let amount = |minor| Amount { minor, currency: price.currency };
        return Err(format!(
            "after shares and fee {} of {price} are left, and one delivery may cost up to {}: lower the shares or the \
             rate, or raise the price",
            amount(left),
            amount(delivery)
        ));
    }
    Ok(())
}

/// Millionths as a percentage without trailing zeros.
pub(crate) fn percent(millionths: u64) -> String {
    let text = format!("{}.{:04}", millionths / 10_000, millionths % 10_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Reads a percentage such as `70` or `12.5` as millionths.
pub(crate) fn parse_percent(text: &str) -> Option<u32> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || whole.len() > 3 || fraction.len() > 4 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let millionths: u32 = format!("{whole}{fraction:0<4}").parse().ok()?;
    (millionths <= 1_000_000).then_some(millionths)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use protocol::Currency;

    #[test]
    fn ceilings_round_up_and_do_not_wrap() {
        assert_eq!(ceiling_micros(1000, 1 << 20, 0), 1000);
        assert_eq!(ceiling_micros(1000, 1, 0), 1);
        assert_eq!(ceiling_micros(1000, 10 << 20, 100_000), 11_000);
        assert_eq!(ceiling_micros(0, u64::MAX, 1), 0);
        assert_eq!(ceiling_micros(u64::MAX, u64::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn percentages_are_exact() {
        for (text, millionths) in [("70", 700_000), ("12.5", 125_000), ("0.0001", 1), ("100", 1_000_000), ("0", 0)] {
            assert_eq!(parse_percent(text), Some(millionths), "{text}");
            assert_eq!(percent(u64::from(millionths)), text);
        }
        for bad in ["", "-1", "100.1", "1e2", "0.00001", ".5", "abc", "1000"] {
            assert_eq!(parse_percent(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_price_must_leave_room_for_delivery() {
        let price = Amount { minor: 999, currency: Currency::USD };
        let share = |millionths| vec![("Band".to_owned(), millionths)];
        check_split(price, &share(700_000), 50_000, 100 * MICROS).unwrap();
        let error = check_split(price, &share(950_000), 0, 100 * MICROS).unwrap_err();
        assert!(error.contains("0.50 USD of 9.99 USD") && error.contains("1.00 USD"), "{error}");
        assert!(check_split(price, &share(990_000), 20_000, 0).unwrap_err().contains("more than the whole price"));
        let free = Amount { minor: 0, currency: Currency::USD };
        check_split(free, &[], 0, 0).unwrap();
        assert!(check_split(free, &[], 0, 1).is_err());
    }
}
