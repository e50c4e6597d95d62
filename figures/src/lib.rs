//! What the programs that measure and draw have in common: tables of measurements as CSV files, medians and quartiles,
//! and pictures of them as SVG and PNG.

pub mod picture;
pub mod spread;
pub mod table;
