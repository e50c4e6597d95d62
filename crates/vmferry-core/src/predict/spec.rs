//! Predictors by name.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use thiserror::Error;

use super::{
    FbrPredictor, FlatPredictor, GapPredictor, LfuPredictor, LrfuPredictor, LruKPredictor, LruPredictor,
    LruSpPredictor, LruSplayPredictor, NoPrediction, Predictor, TimeSeriesPredictor, WorkingSetConfig,
    WorkingSetPredictor,
};

/// Which predictor, and its parameters. As text a name, and after a colon what is to be other than usual:
/// `lcbst`, `lcbst:half-life=8,gaps=off`, `lru-k:k=3`.
///
/// All predictors know as many pages as [`WorkingSetConfig::for_guest`] says, so that they can be compared; `flat` knows
/// all.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum PredictorSpec {
    /// `lcbst`, see [`WorkingSetPredictor`].
    Lcbst {
        /// `half-life`: epochs after which a write counts half.
        half_life_epochs: NonZeroU32,
        /// `gaps`: whether the gaps between writes go into the heat, `on` or `off`.
        gaps: bool,
    },
    /// `lcbst-unaged`: as printed in the paper.
    LcbstUnaged,
    /// `gap`, see [`GapPredictor`].
    Gap {
        /// `half-life`: epochs after which a write to come counts half.
        half_life_epochs: NonZeroU32,
    },
    /// `flat`, see [`FlatPredictor`].
    Flat {
        /// `half-life`: epochs after which a write counts half.
        half_life_epochs: NonZeroU32,
    },
    /// `lru`, see [`LruPredictor`].
    Lru,
    /// `lru-k`, see [`LruKPredictor`].
    LruK {
        /// `k`: which of the last writes; 1 to [`LruKPredictor::MAX_K`].
        k: usize,
    },
    /// `lfu`, see [`LfuPredictor`].
    Lfu,
    /// `fbr`, see [`FbrPredictor`].
    Fbr,
    /// `lrfu`, see [`LrfuPredictor`].
    Lrfu {
        /// `lambda`: how fast writes fade, 0 to 1.
        lambda: f64,
    },
    /// `lru-sp`, see [`LruSpPredictor`].
    LruSp,
    /// `lru-splay`, see [`LruSplayPredictor`].
    LruSplay,
    /// `time-series`, see [`TimeSeriesPredictor`].
    TimeSeries {
        /// `k`: in so many epochs a page must have been written, at least 1.
        k: u32,
        /// `n`: of so many latest ones, at least `k` and at most [`TimeSeriesPredictor::MAX_N`].
        n: u32,
    },
    /// `none`, see [`NoPrediction`].
    None,
}

/// Why a text names no predictor.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PredictorSpecError {
    /// There is no predictor of this name.
    #[error("there is no predictor `{name}`; there are {}", names())]
    UnknownName {
        /// What was asked for.
        name: String,
    },
    /// The predictor has no such parameter.
    #[error("predictor `{name}` has no parameter `{parameter}`; {}", parameters_of(name))]
    UnknownParameter {
        /// The predictor.
        name: &'static str,
        /// What was asked for.
        parameter: String,
    },
    /// The parameter's value is not one that it can have.
    #[error("`{value}` is no value for parameter `{parameter}` of predictor `{name}`, which takes {expected}")]
    BadValue {
        /// The predictor.
        name: &'static str,
        /// Its parameter.
        parameter: &'static str,
        /// What was asked for.
        value: String,
        /// What would be right.
        expected: String,
    },
}

impl PredictorSpec {
    /// Each predictor once, with its usual parameters.
    pub const ALL: [Self; 13] = [
        Self::Lcbst { half_life_epochs: WorkingSetConfig::HALF_LIFE_EPOCHS, gaps: true },
        Self::LcbstUnaged,
        Self::Gap { half_life_epochs: WorkingSetConfig::HALF_LIFE_EPOCHS },
        Self::Flat { half_life_epochs: WorkingSetConfig::HALF_LIFE_EPOCHS },
        Self::Lru,
        Self::LruK { k: 2 },
        Self::Lfu,
        Self::Fbr,
        Self::Lrfu { lambda: 0.01 },
        Self::LruSp,
        Self::LruSplay,
        Self::TimeSeries { k: 2, n: 5 },
        Self::None,
    ];

    /// The predictor's name, without parameters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lcbst { .. } => "lcbst",
            Self::LcbstUnaged => "lcbst-unaged",
            Self::Gap { .. } => "gap",
            Self::Flat { .. } => "flat",
            Self::Lru => "lru",
            Self::LruK { .. } => "lru-k",
            Self::Lfu => "lfu",
            Self::Fbr => "fbr",
            Self::Lrfu { .. } => "lrfu",
            Self::LruSp => "lru-sp",
            Self::LruSplay => "lru-splay",
            Self::TimeSeries { .. } => "time-series",
            Self::None => "none",
        }
    }

    /// A predictor for a guest of so many pages that has seen nothing.
    ///
    /// # Panics
    /// If a parameter is out of its range. What was parsed from text is not.
    pub fn build(&self, total_pages: u64) -> Box<dyn Predictor> {
        self.build_with_capacity(total_pages, WorkingSetConfig::for_guest(total_pages).stack_pages)
    }

    /// As [`Self::build`], for a predictor that knows at most so many pages; `flat` knows all of the guest.
    ///
    /// # Panics
    /// As [`Self::build`], and if the capacity is 0.
    pub fn build_with_capacity(&self, total_pages: u64, capacity: usize) -> Box<dyn Predictor> {
        let config = WorkingSetConfig { stack_pages: capacity, ..WorkingSetConfig::for_guest(total_pages) };
        match *self {
            Self::Lcbst { half_life_epochs, gaps } => Box::new(WorkingSetPredictor::new(WorkingSetConfig {
                half_life_epochs: Some(half_life_epochs),
                gaps,
                ..config
            })),
            Self::LcbstUnaged => Box::new(WorkingSetPredictor::new(config.as_printed())),
            Self::Gap { half_life_epochs } => Box::new(GapPredictor::new(capacity, half_life_epochs)),
            Self::Flat { half_life_epochs } => Box::new(FlatPredictor::new(total_pages, half_life_epochs)),
            Self::Lru => Box::new(LruPredictor::new(capacity)),
            Self::LruK { k } => Box::new(LruKPredictor::new(capacity, k)),
            Self::Lfu => Box::new(LfuPredictor::new(capacity)),
            Self::Fbr => Box::new(FbrPredictor::new(capacity)),
            Self::Lrfu { lambda } => Box::new(LrfuPredictor::new(capacity, lambda)),
            Self::LruSp => Box::new(LruSpPredictor::new(capacity)),
            Self::LruSplay => Box::new(LruSplayPredictor::new(capacity)),
            Self::TimeSeries { k, n } => Box::new(TimeSeriesPredictor::new(capacity, k, n)),
            Self::None => Box::new(NoPrediction),
        }
    }

    /// The parameters with their values, in the order in which they are printed.
    fn parameters(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Lcbst { half_life_epochs, gaps } => {
                let gaps = if *gaps { "on" } else { "off" };
                vec![("half-life", half_life_epochs.to_string()), ("gaps", gaps.to_owned())]
            }
            Self::Gap { half_life_epochs } | Self::Flat { half_life_epochs } => {
                vec![("half-life", half_life_epochs.to_string())]
            }
            Self::LruK { k } => vec![("k", k.to_string())],
            Self::Lrfu { lambda } => vec![("lambda", lambda.to_string())],
            Self::TimeSeries { k, n } => vec![("k", k.to_string()), ("n", n.to_string())],
            Self::LcbstUnaged | Self::Lru | Self::Lfu | Self::Fbr | Self::LruSp | Self::LruSplay | Self::None => vec![],
        }
    }

    /// Sets one parameter from text.
    fn set(&mut self, parameter: &str, value: &str) -> Result<(), PredictorSpecError> {
        let name = self.name();
        let bad = |parameter: &'static str, expected: String| PredictorSpecError::BadValue {
            name,
            parameter,
            value: value.to_owned(),
            expected,
        };
        match (self, parameter) {
            (
                Self::Lcbst { half_life_epochs, .. } | Self::Gap { half_life_epochs } | Self::Flat { half_life_epochs },
                "half-life",
            ) => {
                let epochs = value.parse();
                *half_life_epochs = epochs.map_err(|_| bad("half-life", "a number of epochs from 1 on".to_owned()))?;
            }
            (Self::Lcbst { gaps, .. }, "gaps") => {
                *gaps = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("gaps", "`on` or `off`".to_owned())),
                };
            }
            (Self::LruK { k }, "k") => {
                let most = LruKPredictor::MAX_K;
                let valid = value.parse().ok().filter(|k| (1..=most).contains(k));
                *k = valid.ok_or_else(|| bad("k", format!("1 to {most}")))?;
            }
            (Self::Lrfu { lambda }, "lambda") => {
                let valid = value.parse().ok().filter(|lambda| (0.0..=1.0).contains(lambda));
                *lambda = valid.ok_or_else(|| bad("lambda", "a number from 0 to 1".to_owned()))?;
            }
            (Self::TimeSeries { k, .. }, "k") => {
                let valid = value.parse().ok().filter(|&k: &u32| k > 0);
                *k = valid.ok_or_else(|| bad("k", "a number of epochs from 1 to n".to_owned()))?;
            }
            (Self::TimeSeries { n, .. }, "n") => {
                let most = TimeSeriesPredictor::MAX_N;
                let valid = value.parse().ok().filter(|n| (1..=most).contains(n));
                *n = valid.ok_or_else(|| bad("n", format!("a number of epochs from k to {most}")))?;
            }
            (_, _) => {
                return Err(PredictorSpecError::UnknownParameter { name, parameter: parameter.to_owned() });
            }
        }
        Ok(())
    }
}

impl Default for PredictorSpec {
    /// `lcbst` with its usual parameters.
    fn default() -> Self {
        Self::ALL[0]
    }
}

impl FromStr for PredictorSpec {
    type Err = PredictorSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, parameters) = text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest)));
        let usual = Self::ALL.into_iter().find(|spec| spec.name() == name);
        let mut spec = usual.ok_or_else(|| PredictorSpecError::UnknownName { name: name.to_owned() })?;
        for parameter in parameters.into_iter().flat_map(|parameters| parameters.split(',')) {
            let (parameter, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            spec.set(parameter, value)?;
        }
        match spec {
            // Only once both are known.
            Self::TimeSeries { k, n } if k > n => Err(PredictorSpecError::BadValue {
                name: spec.name(),
                parameter: "k",
                value: k.to_string(),
                expected: format!("at most n, which is {n}"),
            }),
            _ => Ok(spec),
        }
    }
}

impl fmt::Display for PredictorSpec {
    /// The name, and those parameters that are not the usual ones. Parses to the same.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())?;
        let usual = Self::ALL.into_iter().find(|spec| spec.name() == self.name()).map(|spec| spec.parameters());
        let mut separator = ':';
        for (parameter, usual) in self.parameters().into_iter().zip(usual.into_iter().flatten()) {
            if parameter != usual {
                write!(formatter, "{separator}{}={}", parameter.0, parameter.1)?;
                separator = ',';
            }
        }
        Ok(())
    }
}

fn names() -> String {
    PredictorSpec::ALL.map(|spec| spec.name()).join(", ")
}

fn parameters_of(name: &str) -> String {
    let spec = PredictorSpec::ALL.into_iter().find(|spec| spec.name() == name);
    let parameters = spec.map(|spec| spec.parameters()).unwrap_or_default();
    if parameters.is_empty() {
        return "it has none".to_owned();
    }
    let listed: Vec<String> = parameters.into_iter().map(|(name, usual)| format!("{name} (usually {usual})")).collect();
    format!("it has {}", listed.join(", "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec() -> impl Strategy<Value = PredictorSpec> {
        let half_life = || (1..u32::MAX).prop_map(|epochs| NonZeroU32::new(epochs).expect("from 1 on"));
        prop_oneof![
            prop::sample::select(PredictorSpec::ALL.to_vec()),
            (half_life(), any::<bool>())
                .prop_map(|(half_life_epochs, gaps)| PredictorSpec::Lcbst { half_life_epochs, gaps }),
            half_life().prop_map(|half_life_epochs| PredictorSpec::Gap { half_life_epochs }),
            half_life().prop_map(|half_life_epochs| PredictorSpec::Flat { half_life_epochs }),
            (1..=LruKPredictor::MAX_K).prop_map(|k| PredictorSpec::LruK { k }),
            (0.0..=1.0_f64).prop_map(|lambda| PredictorSpec::Lrfu { lambda }),
            (1..=64_u32).prop_flat_map(|n| (1..=n, Just(n))).prop_map(|(k, n)| PredictorSpec::TimeSeries { k, n }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(spec in spec()) {
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }

        #[test]
        fn no_text_makes_it_panic(name in "(lcbst|lru-k|lrfu|time-series|none|[a-z]{0,3})", rest in "(:[a-z0-9=,.-]{0,12})?") {
            if let Ok(spec) = format!("{name}{rest}").parse::<PredictorSpec>() {
                spec.build(100);
            }
        }
    }

    #[test]
    fn each_predictor_is_built_under_its_own_name() {
        for spec in PredictorSpec::ALL {
            assert_eq!(spec.build(1000).name(), spec.name());
            assert_eq!(spec.to_string(), spec.name());
        }
        assert_eq!(PredictorSpec::default().to_string(), "lcbst");
    }

    #[test]
    fn parameters_are_read_and_only_unusual_ones_printed() {
        let parse = |text: &str| text.parse::<PredictorSpec>().map(|spec| spec.to_string());
        assert_eq!(parse("lcbst:half-life=8").as_deref(), Ok("lcbst:half-life=8"));
        assert_eq!(parse("lcbst:gaps=off,half-life=4").as_deref(), Ok("lcbst:gaps=off"));
        assert_eq!(parse("lru-k:k=2").as_deref(), Ok("lru-k"));
        assert_eq!(parse("lrfu:lambda=0.5").as_deref(), Ok("lrfu:lambda=0.5"));
        assert_eq!(parse("time-series:n=9,k=7").as_deref(), Ok("time-series:k=7,n=9"));
    }

    #[test]
    fn errors_say_what_there_is() {
        let message = |text: &str| text.parse::<PredictorSpec>().expect_err(text).to_string();
        let names = "lcbst, lcbst-unaged, gap, flat, lru, lru-k, lfu, fbr, lrfu, lru-sp, lru-splay, time-series, none";
        assert_eq!(message("mru"), format!("there is no predictor `mru`; there are {names}"));
        assert_eq!(message(""), format!("there is no predictor ``; there are {names}"));
        assert_eq!(message("lru:k=2"), "predictor `lru` has no parameter `k`; it has none");
        assert_eq!(
            message("time-series:m=2"),
            "predictor `time-series` has no parameter `m`; it has k (usually 2), n (usually 5)"
        );
        assert_eq!(message("lru-k:k=9"), "`9` is no value for parameter `k` of predictor `lru-k`, which takes 1 to 8");
        assert_eq!(
            message("time-series:k=6"),
            "`6` is no value for parameter `k` of predictor `time-series`, which takes at most n, which is 5"
        );
        assert_eq!(
            message("lcbst:half-life=0"),
            "`0` is no value for parameter `half-life` of predictor `lcbst`, which takes a number of epochs from 1 on"
        );
        assert_eq!(
            message("lrfu:lambda=NaN"),
            "`NaN` is no value for parameter `lambda` of predictor `lrfu`, which takes a number from 0 to 1"
        );
        assert_eq!(
            message("lcbst:gaps"),
            "`` is no value for parameter `gaps` of predictor `lcbst`, which takes `on` or `off`"
        );
    }
}
