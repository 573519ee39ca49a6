//! Lengths of time and ratios, as people write them.

use std::fmt;
use std::time::Duration;

/// A finite number, not below zero.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Ratio(f64);

/// Never NaN, so equality is total.
impl Eq for Ratio {}

impl Ratio {
    /// One.
    pub const ONE: Self = Self(1.0);

    /// `value`, if it is finite and not below zero.
    #[must_use]
    pub fn new(value: f64) -> Option<Self> {
        // Adding zero makes -0 the same zero as the other one.
        (value.is_finite() && value >= 0.0).then_some(Self(value + 0.0))
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> f64 {
        self.0
    }

    /// The number in thousandths, rounded; at most `u32::MAX`.
    #[must_use]
    pub fn permille(self) -> u32 {
        (self.0 * 1000.0).round() as u32
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Units of Go's `time.ParseDuration` with their nanoseconds; longer names first, where one begins with another.
const UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a length of time in the notation of Go's `time.ParseDuration`: numbers with units, such as `1h30m`, `1.5s` or `0`.
pub(super) fn parse_period(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = after.strip_prefix('.').map_or(("", after), digits);
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let (unit, nanos) = UNITS.iter().find(|(unit, _)| after.starts_with(unit))?;
        rest = after.get(unit.len()..)?;
        let nanos = u128::from(*nanos);
        // 20 digits do not overflow the product, and no more than that is a sensible length of time.
        if whole.len() > 19 {
            return None;
        }
        total += if whole.is_empty() { 0 } else { whole.parse::<u128>().ok()? } * nanos;
        let mut scale = nanos;
        for digit in fraction.bytes() {
            scale /= 10;
            total += u128::from(digit - b'0') * scale;
        }
    }
    u64::try_from(total).ok().map(Duration::from_nanos)
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().take_while(u8::is_ascii_digit).count())
}

/// Writes a length of time so that [`parse_period`] reads the same one.
pub(super) fn show_period(period: Duration) -> String {
    let mut rest = period.as_nanos();
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut out = String::new();
    for (unit, nanos) in UNITS.iter().rev().filter(|(unit, _)| unit.is_ascii()) {
        let count = rest / u128::from(*nanos);
        if count > 0 {
            out.push_str(&format!("{count}{unit}"));
            rest -= count * u128::from(*nanos);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn go_duration_notation() {
        for (text, millis) in [
            ("0", 0),
            ("0s", 0),
            ("10m", 600_000),
            ("1h30m", 5_400_000),
            ("2m0s", 120_000),
            ("1.5s", 1_500),
            (".5s", 500),
            ("1.s", 1_000),
            ("300ms", 300),
            ("+3s", 3_000),
            ("1000µs", 1),
        ] {
            assert_eq!(parse_period(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "10", "m", "-5s", "5 s", "5d", ".s", "1.5", "+", "99999999999999999999h", "1e3s", "ten"] {
            assert_eq!(parse_period(bad), None, "{bad}");
        }
        assert_eq!(show_period(Duration::from_secs(5_400)), "1h30m");
    }

    #[test]
    fn ratios_are_finite() {
        assert_eq!(Ratio::new(-0.0).map(|r| r.to_string()), Some("0".to_owned()));
        assert_eq!(Ratio::new(0.3335).map(Ratio::permille), Some(334));
        assert_eq!(Ratio::new(f64::MAX).map(Ratio::permille), Some(u32::MAX));
        assert!([f64::NAN, f64::INFINITY, -0.1].into_iter().all(|bad| Ratio::new(bad).is_none()));
    }

    proptest! {
        #[test]
        fn display_and_parse_round_trip(nanos in any::<u64>()) {
            let period = Duration::from_nanos(nanos);
            prop_assert_eq!(parse_period(&show_period(period)), Some(period));
        }

        #[test]
        fn parse_of_any_text_does_not_panic(text in "[-+0-9.a-zµμ ]{0,40}|.{0,20}") {
            let _ = parse_period(&text);
        }
    }
}
