//! Means and how far to trust them.

use serde::Serialize;

/// A mean with its interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// How many values.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Half the width of the 95 % interval around it, by Student's t distribution; `None` of a single value.
    pub half_width: Option<f64>,
}

impl Estimate {
    /// The mean of these values; `None` of nothing.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        if count == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        let half_width = (count > 1).then(|| {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let variance = squares / (count - 1) as f64;
            student_975(count - 1) * (variance / count as f64).sqrt()
        });
        Some(Self { count, mean, half_width })
    }
}

/// The 97.5 % point of Student's t distribution with so many degrees of freedom, to three decimals.
///
/// Closed forms for 1 and 2, and beyond a table the expansion in the normal distribution's point: Abramowitz and Stegun,
/// Handbook of Mathematical Functions, 26.7.5.
fn student_975(degrees: usize) -> f64 {
    const TABLE: [f64; 8] = [3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    match degrees {
        0 | 1 => 12.706,
        2 => 4.303,
        3..=10 => TABLE[degrees - 3],
        _ => {
            let z: f64 = 1.959_964;
            let n = degrees as f64;
            let terms = [
                (z.powi(3) + z) / 4.0,
                (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
                (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
            ];
            z + terms[0] / n + terms[1] / n.powi(2) + terms[2] / n.powi(3)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_no_mean_and_one_value_no_interval() {
        assert_eq!(Estimate::of(&[]), None);
        assert_eq!(Estimate::of(&[4.5]), Some(Estimate { count: 1, mean: 4.5, half_width: None }));
    }

    #[test]
    fn equal_values_leave_no_doubt() {
        assert_eq!(Estimate::of(&[2.0; 7]), Some(Estimate { count: 7, mean: 2.0, half_width: Some(0.0) }));
    }

    #[test]
    fn the_interval_is_that_of_the_textbook() {
        // Mean 3, variance 2.5, so 2.776 × √(2.5 / 5).
        let estimate = Estimate::of(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert_eq!((estimate.count, estimate.mean), (5, 3.0));
        assert!((estimate.half_width.unwrap() - 1.963).abs() < 5e-4, "{estimate:?}");
    }

    #[test]
    fn the_t_distribution_agrees_with_printed_tables() {
        for (degrees, expected) in
            [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (11, 2.201), (15, 2.131), (30, 2.042), (120, 1.980)]
        {
            assert!((student_975(degrees) - expected).abs() < 1e-3, "{degrees}: {}", student_975(degrees));
        }
        assert!((1..200).all(|degrees| student_975(degrees) > student_975(degrees + 1)));
    }
}
