//! The guest's address on a network, for tests that talk to it.

use std::net::Ipv4Addr;

use crate::parameters::ParameterError;

/// The port of the echo, over TCP and over UDP, as RFC 862 has it.
pub const ECHO_PORT: u16 = 7;

/// Words of a kernel command line that belong to [`Network`] and not to [`Parameters`](crate::Parameters).
pub(crate) const KEYS: [&str; 1] = ["network"];

/// The guest's address on its first network card, where it sends back what it is sent.
///
/// As a word of a kernel command line: `vmferry.network=192.0.2.10/24`. Without it the card is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The address.
    pub address: Ipv4Addr,
    /// How many bits of it name the network, 1 to 32.
    pub prefix_bits: u32,
}

impl Network {
    /// Reads the word of a kernel command line that is about the network; `None` if there is none.
    ///
    /// # Errors
    /// When it is no address with a prefix.
    pub fn from_command_line(line: &str) -> Result<Option<Self>, ParameterError> {
        let words = line.split_ascii_whitespace();
        let Some(value) = words.filter_map(|word| word.strip_prefix("vmferry.network=")).next_back() else {
            return Ok(None);
        };
        let parse = || {
            let (address, bits) = value.split_once('/')?;
            let prefix_bits = bits.parse().ok().filter(|bits| (1..=32).contains(bits))?;
            Some(Self { address: address.parse().ok()?, prefix_bits })
        };
        parse().map(Some).ok_or_else(|| ParameterError::Value { key: "network", value: value.to_owned() })
    }

    /// The mask that takes the network out of an address.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - self.prefix_bits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_of_a_command_line_is_read() {
        assert_eq!(Network::from_command_line("quiet ip=dhcp vmferry.rate=3"), Ok(None));
        let read = |value: &str| Network::from_command_line(&format!("quiet vmferry.network={value}"));
        let network = read("192.0.2.10/25").unwrap().unwrap();
        assert_eq!(network, Network { address: Ipv4Addr::new(192, 0, 2, 10), prefix_bits: 25 });
        assert_eq!(network.mask(), Ipv4Addr::new(255, 255, 255, 128));
        assert_eq!(read("192.0.2.10/32").unwrap().unwrap().mask(), Ipv4Addr::BROADCAST);
        for wrong in ["", "192.0.2.10", "192.0.2.10/0", "192.0.2.10/33", "192.0.2/24", "192.0.2.10/x"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
