//! What this machine can do at best, measured: reading memory, and multiplying and adding in f32.

use std::arch::x86_64::{__m256, __m512};
use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps, _mm512_fmadd_ps, _mm512_set1_ps};
use std::arch::x86_64::{_mm512_add_epi64, _mm512_loadu_si512, _mm512_reduce_add_epi64, _mm512_set1_epi64};
use std::hint::black_box;
use std::time::Instant;

use crate::error::Error;
use crate::memory::{Region, available_bytes};
use crate::pool::Pool;

/// Limits of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes read a second. On a processor: by all threads, from a working set as large as the weights (64 MiB to 1 GiB).
    pub read_bytes_per_s: f64,
    /// Multiplications and additions a second.
    pub flops_per_s: f64,
    /// Which arithmetic that is, and how it is known.
    pub arithmetic: &'static str,
}

/// Passes of each measurement; the best counts.
const PASSES: usize = 5;
/// Chunks that threads claim.
const CHUNKS: i64 = 256;
/// Fused multiply-adds of each accumulator in one chunk.
const ROUNDS: usize = 20_000;
/// Accumulators: enough to hide the latency of an FMA on two ports.
const ACCUMULATORS: usize = 12;

impl Limits {
    /// Measures the processor with a team of threads and a working set of `bytes`.
    /// # Errors
    /// [`Error`] if memory cannot be had.
    pub fn measure(pool: &mut Pool, bytes: u64) -> Result<Self, Error> {
        Ok(Self { read_bytes_per_s: read(pool, bytes)?, flops_per_s: flops(pool), arithmetic: "f32" })
    }
}

fn read(pool: &mut Pool, bytes: u64) -> Result<f64, Error> {
    let free = available_bytes().unwrap_or(u64::MAX) / 4;
    let bytes = bytes.clamp(64 << 20, 1 << 30).min(free.max(1 << 20)) / 4096 * 4096;
    let mut region = Region::reserve(bytes).map_err(|error| Error::Memory { what: "bench", bytes, error })?;
    region.advise_huge();
    region.as_mut_slice().fill(1);
    let words: &[u64] = bytemuck::cast_slice(region.as_slice());
    let chunk = words.len().div_ceil(CHUNKS as usize);
    let sum = sum();
    let seconds = best(|| {
        pool.run(CHUNKS, &|_, first, last| {
            for part in words.chunks(chunk).skip(first as usize).take((last - first) as usize) {
                black_box(sum(part));
            }
        });
    });
    Ok(bytes as f64 / seconds)
}

/// A sum with the widest loads that the processor has: narrower ones read a third of what wide ones do.
fn sum() -> fn(&[u64]) -> u64 {
    if std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512.
        |words| unsafe { sum_512(words) }
    } else if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        |words| unsafe { sum_256(words) }
    } else {
        lanes_sum
    }
}

#[target_feature(enable = "avx512f")]
fn sum_512(words: &[u64]) -> u64 {
    let mut sums = [_mm512_set1_epi64(0); 4];
    let (parts, rest) = words.as_chunks::<32>();
    for part in parts {
        for (sum, words) in sums.iter_mut().zip(part.as_chunks::<8>().0) {
            // SAFETY: the pointer leads to eight words.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(words.as_ptr().cast()) });
        }
    }
    let lanes = sums.into_iter().reduce(|a, b| _mm512_add_epi64(a, b)).map_or(0, |sum| _mm512_reduce_add_epi64(sum));
    rest.iter().fold(lanes as u64, |a, b| a.wrapping_add(*b))
}

#[target_feature(enable = "avx2")]
fn sum_256(words: &[u64]) -> u64 {
    lanes_sum(words)
}

/// A sum in 32 lanes, which compiles to loads and adds as wide as the function that it is inlined into may use.
#[inline(always)]
fn lanes_sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for words in words.chunks_exact(lanes.len()) {
        lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = lane.wrapping_add(*word));
    }
    let rest = words.chunks_exact(lanes.len()).remainder();
    lanes.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

fn flops(pool: &mut Pool) -> f64 {
    type Chunk = fn();
    let (lanes, chunk): (usize, Chunk) = if std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512.
        (16, || unsafe { chunk_512() })
    } else if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        // SAFETY: the processor has AVX2 and FMA.
        (8, || unsafe { chunk_256() })
    } else {
        return f64::INFINITY;
    };
    let seconds = best(|| pool.run(CHUNKS, &|_, first, last| (first..last).for_each(|_| chunk())));
    (CHUNKS as usize * ROUNDS * ACCUMULATORS * lanes * 2) as f64 / seconds
}

fn best(mut run: impl FnMut()) -> f64 {
    let timed = |_| {
        let begun = Instant::now();
        run();
        begun.elapsed().as_secs_f64()
    };
    (0..PASSES).map(timed).fold(f64::INFINITY, f64::min)
}

#[target_feature(enable = "avx512f")]
fn chunk_512() {
    let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
    let mut sums: [__m512; ACCUMULATORS] = [b; ACCUMULATORS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2,fma")]
fn chunk_256() {
    let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
    let mut sums: [__m256; ACCUMULATORS] = [b; ACCUMULATORS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive_and_a_sum_is_a_sum() {
        let limits = Limits::measure(&mut Pool::new(2).unwrap(), 1).unwrap();
        assert!(limits.read_bytes_per_s > 1e8 && limits.flops_per_s > 1e8, "{limits:?}");
        assert_eq!([sum(), lanes_sum].map(|sum| sum(&[3; 64])), [192; 2]);
        assert_eq!(sum()(&[1; 37]), 37);
    }
}
