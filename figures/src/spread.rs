//! Medians and quartiles.

/// What several repetitions of one measurement gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The least.
    pub minimum: f64,
    /// A quarter is below.
    pub quartile_1: f64,
    /// Half is below.
    pub median: f64,
    /// Three quarters are below.
    pub quartile_3: f64,
    /// The greatest.
    pub maximum: f64,
}

impl Spread {
    /// Of these samples.
    ///
    /// # Panics
    /// If there are no samples.
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            minimum: quantile(&samples, 0.0),
            quartile_1: quantile(&samples, 0.25),
            median: quantile(&samples, 0.5),
            quartile_3: quantile(&samples, 0.75),
            maximum: quantile(&samples, 1.0),
        }
    }

    /// All five in ascending order.
    pub const fn ascending(&self) -> [f64; 5] {
        [self.minimum, self.quartile_1, self.median, self.quartile_3, self.maximum]
    }
}

/// The value below which a share of the samples lies, with a straight line between neighbours (type 7 of Hyndman and Fan,
/// The American Statistician 50(4), 1996).
///
/// # Panics
/// If there are no samples.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let (below, part) = (position.floor() as usize, position.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] * (1.0 - part) + sorted[above] * part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(spread.ascending(), [1.0, 1.75, 2.5, 3.25, 4.0]);
    }

    #[test]
    fn one_sample_is_all_quantiles() {
        assert_eq!(Spread::of(vec![7.0]).ascending(), [7.0; 5]);
    }
}
