//! The small floats, as bits: bfloat16, IEEE half, and e4m3fn.

/// Round to nearest, ties to even; a NaN stays one.
pub fn encode_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The number a bfloat16 stands for.
pub fn decode_bf16(b: u16) -> f32 {
    f32::from_bits(u32::from(b) << 16)
}

/// Round to nearest, ties to even, with denormals; a number too large becomes infinite.
pub fn encode_f16(x: f32) -> u16 {
    let sign = ((x.to_bits() >> 16) & 0x8000) as u16;
    let a = x.abs();
    if a.is_nan() {
        return sign | 0x7e00;
    }
    if a >= 65520.0 {
        return sign | 0x7c00;
    }
    if a < 6.103_515_6e-5 {
        // denormal: adding 2^-1 ulp-aligned magic lets the FPU round
        return sign | ((a + 0.5).to_bits() - 0.5f32.to_bits()) as u16;
    }
    let bits = a.to_bits();
    let rounded = bits + 0xfff + ((bits >> 13) & 1);
    sign | ((rounded >> 13) - (112 << 10)) as u16
}

/// The number an IEEE half stands for.
pub fn decode_f16(h: u16) -> f32 {
    let sign = f32::from_bits((u32::from(h) & 0x8000) << 16);
    let magnitude = match h & 0x7fff {
        0x7c00 => f32::INFINITY,
        m if m > 0x7c00 => f32::NAN,
        m => f32::from_bits(u32::from(m) << 13) * f32::from_bits(0x7780_0000),
    };
    magnitude.copysign(if sign.is_sign_negative() { -1.0 } else { 1.0 })
}

/// Round to nearest, ties to even, with denormals; a number too large becomes the largest, 448; a NaN stays one.
pub fn encode_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let a = x.abs();
    if a.is_nan() {
        return sign | 0x7f;
    }
    if a >= 448.0 {
        return sign | 0x7e;
    }
    if a < 0.015_625 {
        // denormal, a multiple of 2^-9: adding a number whose last bit has that weight lets the FPU round
        return sign | ((a + 16384.0).to_bits() - 16384.0f32.to_bits()) as u8;
    }
    let bits = a.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The number an e4m3fn stands for: no infinities, and one NaN of each sign.
pub fn decode_e4m3(b: u8) -> f32 {
    let magnitude = match b & 0x7f {
        0x7f => f32::NAN,
        // exponents move by 2^120, exact for denormals too
        m => f32::from_bits(u32::from(m) << 20) * f32::from_bits(0x7b80_0000),
    };
    magnitude.copysign(if b & 0x80 == 0 { 1.0 } else { -1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_agrees_with_its_definition_for_every_half() {
        for h in 0..=u16::MAX {
            let exponent = i32::from((h >> 10) & 31);
            let mantissa = f64::from(h & 1023);
            let sign = if h & 0x8000 == 0 { 1.0 } else { -1.0 };
            let want = match exponent {
                0 => sign * mantissa * 2f64.powi(-24),
                31 => continue,
                e => sign * (1024.0 + mantissa) * 2f64.powi(e - 25),
            };
            assert_eq!(f64::from(decode_f16(h)), want);
            assert_eq!(encode_f16(want as f32), h);
        }
    }

    #[test]
    fn e4m3_agrees_with_its_definition_and_rounds_to_nearest_even() {
        let value = |b: u8| {
            let (e, m) = (i32::from((b >> 3) & 15), f64::from(b & 7));
            if e == 0 { m * 2f64.powi(-9) } else { (8.0 + m) * 2f64.powi(e - 10) }
        };
        for b in 0..0x7f {
            assert_eq!(f64::from(decode_e4m3(b)), value(b), "{b:#x}");
            assert_eq!(decode_e4m3(b | 0x80).to_bits(), (-value(b) as f32).to_bits());
            assert_eq!(encode_e4m3(value(b) as f32), b);
            if b < 0x7e {
                let middle = (value(b) + value(b + 1)) / 2.0;
                assert_eq!(encode_e4m3(middle as f32), b + (b & 1), "between {b:#x} and the next");
                assert_eq!(encode_e4m3((middle as f32).next_up()), b + 1);
                assert_eq!(encode_e4m3((middle as f32).next_down()), b);
            }
        }
        assert!(decode_e4m3(0x7f).is_nan() && decode_e4m3(0xff).is_nan());
        assert_eq!([encode_e4m3(1e9), encode_e4m3(f32::NEG_INFINITY), encode_e4m3(f32::NAN)], [0x7e, 0xfe, 0x7f]);
    }
}
