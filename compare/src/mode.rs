//! The ways to move a guest: vmferry's, and those of QEMU's own migration.

use clap::ValueEnum;
use serde_json::{Value, json};

/// QEMU's limit of bandwidth, lifted: the link is the limit.
const BANDWIDTH_BYTES_PER_S: u64 = 100 << 30;

/// Connections of multifd.
const CHANNELS: u32 = 4;

/// Old versions of pages that xbzrle keeps. Larger than any hot set here: its default of 64 MiB would thrash on one.
const XBZRLE_CACHE_BYTES: u64 = 256 << 20;

/// One way to move a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Mode {
    /// vmferry with its defaults
    Vmferry,
    /// QEMU: pre-copy, one connection
    Precopy,
    /// QEMU: pre-copy that sends deltas of pages it sent before
    Xbzrle,
    /// QEMU: pre-copy that takes processor time from a guest which does not converge
    AutoConverge,
    /// QEMU: pre-copy over four connections
    Multifd,
    /// QEMU: the same, compressed with zstd
    MultifdZstd,
    /// QEMU: post-copy after one pass of pre-copy
    Postcopy,
}

impl Mode {
    pub(crate) const ALL: [Self; 7] = [
        Self::Vmferry,
        Self::Precopy,
        Self::Xbzrle,
        Self::AutoConverge,
        Self::Multifd,
        Self::MultifdZstd,
        Self::Postcopy,
    ];

    /// The modes of a quick comparison.
    pub(crate) const QUICK: [Self; 3] = [Self::Vmferry, Self::Precopy, Self::MultifdZstd];

    /// Its name on the command line and in tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vmferry => "vmferry",
            Self::Precopy => "precopy",
            Self::Xbzrle => "xbzrle",
            Self::AutoConverge => "auto-converge",
            Self::Multifd => "multifd",
            Self::MultifdZstd => "multifd-zstd",
            Self::Postcopy => "postcopy",
        }
    }

    /// The one with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// QEMU's capability of this mode, beside the events.
    const fn capability(self) -> Option<&'static str> {
        match self {
            Self::Vmferry | Self::Precopy => None,
            Self::Xbzrle => Some("xbzrle"),
            Self::AutoConverge => Some("auto-converge"),
            Self::Multifd | Self::MultifdZstd => Some("multifd"),
            Self::Postcopy => Some("postcopy-ram"),
        }
    }

    /// The arguments of `migrate-set-capabilities`, for both sides.
    pub(crate) fn capabilities(self) -> Value {
        let on = |name: &str| json!({"capability": name, "state": true});
        let named: Vec<Value> = [Some("events"), self.capability()].into_iter().flatten().map(on).collect();
        json!({"capabilities": named})
    }

    /// The arguments of `migrate-set-parameters`, for both sides.
    pub(crate) fn parameters(self, downtime_limit_ms: u64) -> Value {
        let mut parameters = json!({
            "max-bandwidth": BANDWIDTH_BYTES_PER_S,
            // 0 is no limit here.
            "max-postcopy-bandwidth": 0,
            "downtime-limit": downtime_limit_ms,
        });
        match self {
            Self::Vmferry | Self::Precopy | Self::AutoConverge | Self::Postcopy => {}
            Self::Xbzrle => parameters["xbzrle-cache-size"] = json!(XBZRLE_CACHE_BYTES),
            Self::Multifd => parameters["multifd-channels"] = json!(CHANNELS),
            Self::MultifdZstd => {
                parameters["multifd-channels"] = json!(CHANNELS);
                parameters["multifd-compression"] = json!("zstd");
            }
        }
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_those_of_the_command_line() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_possible_value().unwrap().get_name(), mode.name());
            assert_eq!(Mode::named(mode.name()), Some(mode));
        }
        assert_eq!(Mode::value_variants(), Mode::ALL);
        assert_eq!(Mode::named("other"), None);
    }

    #[test]
    fn every_mode_has_the_same_limits() {
        for mode in Mode::ALL {
            let parameters = mode.parameters(300);
            assert_eq!(parameters["downtime-limit"], 300);
            assert_eq!(parameters["max-bandwidth"], BANDWIDTH_BYTES_PER_S);
            let capabilities = mode.capabilities();
            let capabilities = capabilities["capabilities"].as_array().unwrap();
            assert_eq!(capabilities[0]["capability"], "events");
            assert!(capabilities.iter().all(|capability| capability["capability"] != "x-ignore-shared"));
        }
        assert_eq!(Mode::MultifdZstd.parameters(300)["multifd-compression"], "zstd");
    }
}
