//! Figures of the benchmarks: a value, what a user would pick instead measured in the same run, their ratio and the bar.

use std::fmt;

use serde::Serialize;

/// What a figure must reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// The value itself, in its unit, must not be above.
    AtMost(f64),
    /// value/anchor (more is better) or anchor/value (less is better) must not be below.
    Ratio(f64),
    /// Shown for information.
    None,
}

/// Which direction is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Latencies, sizes.
    Less,
    /// Rates.
    More,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Figure {
    /// The benchmark.
    pub bench: &'static str,
    /// What was measured, unit as suffix.
    pub name: String,
    /// Median of the rounds.
    pub value: f64,
    /// The alternative's name and median, if there is one.
    pub anchor: Option<(&'static str, f64)>,
    /// Direction.
    pub better: Better,
    /// What must be reached.
    pub bars: Vec<Bar>,
}

#[derive(Serialize)]
struct Line<'a> {
    bench: &'a str,
    figure: &'a str,
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    anchor: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    anchor_value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    bar: String,
    met: bool,
}

impl Figure {
    /// How many times better than the anchor; above 1 is better.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let (_, anchor) = self.anchor?;
        Some(match self.better {
            Better::More => self.value / anchor,
            Better::Less => anchor / self.value,
        })
    }

    /// Whether every bar is met.
    #[must_use]
    pub fn met(&self) -> bool {
        self.bars.iter().all(|bar| match bar {
            Bar::AtMost(limit) => self.value <= *limit,
            Bar::Ratio(least) => self.ratio().is_some_and(|r| r >= *least),
            Bar::None => true,
        })
    }

    /// The bars as text.
    #[must_use]
    pub fn bar(&self) -> String {
        let bars: Vec<String> = self
            .bars
            .iter()
            .filter_map(|bar| match bar {
                Bar::AtMost(limit) => Some(format!("value<={limit}")),
                Bar::Ratio(least) => Some(format!("ratio>={least}")),
                Bar::None => None,
            })
            .collect();
        bars.join(" and ")
    }

    /// One JSON object on one line.
    #[must_use]
    pub fn json(&self) -> String {
        let round = |v: f64| (v * 1000.0).round() / 1000.0;
        let line = Line {
            bench: self.bench,
            figure: &self.name,
            value: round(self.value),
            anchor: self.anchor.map(|(name, _)| name),
            anchor_value: self.anchor.map(|(_, value)| round(value)),
            ratio: self.ratio().map(round),
            bar: self.bar(),
            met: self.met(),
        };
        serde_json::to_string(&line).unwrap_or_default()
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (anchor, anchor_value) = match self.anchor {
            Some((name, value)) => (name, format!("{value:.3}")),
            None => ("", String::new()),
        };
        let ratio = self.ratio().map(|r| format!("{r:.3}")).unwrap_or_default();
        let met = match (self.bar().is_empty(), self.met()) {
            (true, _) => "",
            (_, true) => "met",
            (_, false) => "MISSED",
        };
        let (bench, name, bar) = (self.bench, &self.name, self.bar());
        write!(f, "{bench:6} {name:34} {:>14.3} {anchor:18} {anchor_value:>14} {ratio:>8}  {bar:26} {met}", self.value)
    }
}

/// The value in the middle of the sorted rounds; 0 of nothing.
#[must_use]
pub fn percentile(rounds: &[f64], p: f64) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get(((last as f64) * p / 100.0).round() as usize).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_point_the_right_way_and_bars_can_be_missed() {
        let mut figure = Figure {
            bench: "add",
            name: "p50_ms".into(),
            value: 3.0,
            anchor: Some(("ptp", 12.0)),
            better: Better::Less,
            bars: vec![Bar::AtMost(5.0), Bar::Ratio(3.0)],
        };
        assert_eq!((figure.ratio(), figure.met()), (Some(4.0), true));
        assert!(figure.json().contains(r#""ratio":4.0,"bar":"value<=5 and ratio>=3","met":true"#), "{}", figure.json());
        figure.value = 4.5;
        assert!(!figure.met());
        figure.better = Better::More;
        figure.bars = vec![Bar::Ratio(0.4)];
        assert!(!figure.met());
    }

    #[test]
    fn percentiles() {
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 50.0), 2.0);
        assert_eq!(percentile(&[], 99.0), 0.0);
        let many: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(percentile(&many, 99.0), 99.0);
    }
}
