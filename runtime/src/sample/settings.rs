//! The numbers that say how to choose: names, ranges, and where they stand in [`Sampling`]. The command line, a checkpoint's
//! `generation_config.json` and a line of a prompts file are read by this one table.

use super::{SampleError, Sampling};

/// What a number may be.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// As in `generation_config.json`; the option has dashes.
    pub name: &'static str,
    /// In words.
    pub expected: &'static str,
    /// True for what is allowed; never for NaN.
    pub allows: fn(f64) -> bool,
}

impl Range {
    /// Checks a value.
    /// # Errors
    /// [`SampleError::Setting`] if it is out of range.
    pub fn check(&self, value: f64) -> Result<(), SampleError> {
        let Self { name, expected, allows } = *self;
        allows(value).then_some(()).ok_or(SampleError::Setting { name, value, expected })
    }
}

/// A number of [`Sampling`].
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// What it may be.
    pub range: Range,
    /// Reads it.
    pub get: fn(&Sampling) -> f64,
    /// Writes it.
    pub set: fn(&mut Sampling, f64),
}

impl Setting {
    /// Checks a value.
    /// # Errors
    /// [`SampleError::Setting`] if it is out of range.
    pub fn check(&self, value: f64) -> Result<(), SampleError> {
        self.range.check(value)
    }

    /// The setting of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|s| s.range.name == name)
    }
}

/// What a token's bias may be.
pub const LOGIT_BIAS: Range = Range {
    name: "logit_bias",
    expected: "a number from -10000 to 10000",
    allows: |x| (-10_000.0..=10_000.0).contains(&x),
};

const PENALTY: &str = "a number from -100 to 100";

/// A row of [`SETTINGS`]: field, expected, allowed.
macro_rules! setting {
    ($field:ident, $expected:expr, $allows:expr) => {
        Setting {
            range: Range { name: stringify!($field), expected: $expected, allows: $allows },
            get: |s| s.$field as f64,
            set: |s, x| s.$field = x as _,
        }
    };
}

/// All numbers but the seed, which may be any.
#[rustfmt::skip]
pub const SETTINGS: &[Setting] = &[
    setting!(repetition_penalty, "a number from 0.01 to 100", |x| (0.01..=100.0).contains(&x)),
    setting!(presence_penalty, PENALTY, |x| (-100.0..=100.0).contains(&x)),
    setting!(frequency_penalty, PENALTY, |x| (-100.0..=100.0).contains(&x)),
    setting!(temperature, "a number from 0 to 1000", |x| (0.0..=1000.0).contains(&x)),
    setting!(top_k, "a whole number, 0 or more", |x| x >= 0.0 && x.fract() == 0.0 && x <= f64::from(u32::MAX)),
    setting!(top_p, "above 0 and at most 1", |x| x > 0.0 && x <= 1.0),
    setting!(min_p, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x)),
];

/// Parses the value of the option that sets `name`.
pub(crate) fn parse_number(name: &'static str) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| {
        let setting = Setting::find(name).expect("options are named as the table's rows");
        let value: Option<f64> = text.trim().parse().ok().filter(|&x| setting.check(x).is_ok());
        value.ok_or_else(|| format!("expected {}", setting.range.expected))
    }
}
