//! What a CPU's widest vectors and its matrix unit do, as LLVM's intrinsics for AVX-512, its BF16 and VNNI, and AMX.
//!
//! Tile registers go by their numbers: 0 to 3 are the sums, 4 and 5 A, 6 and 7 B. Nothing but the ops of tiles changes them. A function with products loads the configuration first and gives the registers back at its end.

use inkwell::module::Linkage;
use inkwell::types::VectorType;
use inkwell::values::{BasicMetadataValueEnum, BasicValueEnum, PointerValue, VectorValue};
use nextc_ir::kernel::{KOp, Region, Stmt};

use super::{EmitError, Emitter, Result, count, kind};

/// Bytes of a line of a tile.
const LINE_BYTES: u64 = 64;
/// Lines of a tile, and words of a line.
const ROWS: u64 = 16;
/// The first registers of A and B.
const A: usize = 4;
const B: usize = 6;
/// The name of the configuration in the module.
const CONFIGURATION: &str = "nextc_tiles";

/// True if a region multiplies tiles.
fn has_products(region: &Region) -> bool {
    region.stmts.iter().any(|s| matches!(s.op, KOp::TileStep { .. }) || s.regions.iter().any(has_products))
}

impl<'c> Emitter<'_, 'c> {
    /// Before a region: configures the tile registers if it uses them. Gives whether it does.
    pub(super) fn begin_tiles(&self, region: &Region) -> Result<bool> {
        let used = has_products(region);
        if used {
            let bytes = self.context.i8_type();
            // all 64 bytes are the configuration: a constant with nothing left out
            let values: Vec<_> = configuration().iter().map(|&b| bytes.const_int(b.into(), false)).collect();
            let place = self.module.get_global(CONFIGURATION).unwrap_or_else(|| {
                let place = self.module.add_global(bytes.array_type(64), None, CONFIGURATION);
                place.set_initializer(&bytes.const_array(&values));
                place.set_constant(true);
                place.set_linkage(Linkage::Private);
                place.set_alignment(LINE_BYTES as u32);
                place
            });
            self.call_intrinsic("llvm.x86.ldtilecfg", &[place.as_pointer_value().into()])?;
        }
        Ok(used)
    }

    /// After a region that used tile registers.
    pub(super) fn end_tiles(&self, used: bool) -> Result<()> {
        if used { self.call_intrinsic("llvm.x86.tilerelease", &[]).map(drop) } else { Ok(()) }
    }

    /// The instruction looks at the lowest four bits of a lane, so nothing masks the others.
    pub(super) fn nibble(&self, stmt: &Stmt, shift: u32) -> Result<BasicValueEnum<'c>> {
        const NAME: &str = "llvm.x86.avx512.permvar.sf.512";
        let BasicValueEnum::VectorValue(words) = self.arg(stmt, 0)? else {
            return Err(kind(stmt, self.arg(stmt, 0)?, "16 words"));
        };
        let (f32, i32) = (self.context.f32_type(), self.context.i32_type());
        let table: Vec<_> = (0..ROWS).map(|i| f32.const_float(i as f64 - 8.0)).collect();
        let by = VectorType::const_vector(&[i32.const_int(shift.into(), false); ROWS as usize]);
        let index = self.builder.build_right_shift(words, by, false, "index")?;
        let args = [VectorType::const_vector(&table).into(), index.into()];
        self.call_intrinsic(NAME, &args)?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(NAME))
    }

    /// Two vectors as 32 halves, the first in the lower.
    fn halves(&self, stmt: &Stmt) -> Result<VectorValue<'c>> {
        const NAME: &str = "llvm.x86.avx512bf16.cvtne2ps2bf16.512";
        let args = [self.arg(stmt, 1)?.into(), self.arg(stmt, 0)?.into()];
        let value = self.call_intrinsic(NAME, &args)?.try_as_basic_value().basic();
        let halves = self.context.i16_type().vec_type(2 * ROWS as u32);
        let value = value.ok_or(EmitError::Intrinsic(NAME))?;
        Ok(self.builder.build_bit_cast(value, halves, "halves")?.into_vector_value())
    }

    fn words(&self, halves: VectorValue<'c>) -> Result<BasicValueEnum<'c>> {
        Ok(self.builder.build_bit_cast(halves, self.context.i32_type().vec_type(ROWS as u32), "words")?)
    }

    pub(super) fn bf16_row(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        self.words(self.halves(stmt)?)
    }

    pub(super) fn bf16_pairs(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let halves = self.halves(stmt)?;
        let i32 = self.context.i32_type();
        let mask: Vec<_> = (0..ROWS).flat_map(|i| [i, i + ROWS]).map(|i| i32.const_int(i, false)).collect();
        let poison = halves.get_type().get_poison();
        self.words(self.builder.build_shuffle_vector(halves, poison, VectorType::const_vector(&mask), "pairs")?)
    }

    /// A vector of 64 bytes.
    fn bytes(&self, words: BasicValueEnum<'c>) -> Result<BasicValueEnum<'c>> {
        Ok(self.builder.build_bit_cast(words, self.context.i8_type().vec_type(4 * ROWS as u32), "bytes")?)
    }

    pub(super) fn byte_row(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let (i8, i32) = (self.context.i8_type(), self.context.i32_type());
        let low = |i| -> Result<VectorValue<'c>> {
            let BasicValueEnum::VectorValue(words) = self.arg(stmt, i)? else {
                return Err(kind(stmt, self.arg(stmt, i)?, "16 words"));
            };
            Ok(self.builder.build_int_truncate(words, i8.vec_type(ROWS as u32), "low")?)
        };
        let join = |a, b, lanes: u64| {
            let mask: Vec<_> = (0..lanes).map(|i| i32.const_int(i, false)).collect();
            self.builder.build_shuffle_vector(a, b, VectorType::const_vector(&mask), "row")
        };
        let (first, second) = (join(low(0)?, low(1)?, 2 * ROWS)?, join(low(2)?, low(3)?, 2 * ROWS)?);
        let row = join(first, second, 4 * ROWS)?;
        Ok(self.builder.build_bit_cast(row, i32.vec_type(ROWS as u32), "words")?)
    }

    pub(super) fn byte_dot(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        const NAME: &str = "llvm.x86.avx512.vpdpbusd.512";
        let [a, b] = [self.bytes(self.arg(stmt, 1)?)?, self.bytes(self.arg(stmt, 2)?)?];
        let args = [self.arg(stmt, 0)?.into(), a.into(), b.into()];
        self.call_intrinsic(NAME, &args)?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(NAME))
    }

    pub(super) fn pair_dot(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        const NAME: &str = "llvm.x86.avx512bf16.dpbf16ps.512";
        let halves = self.context.bf16_type().vec_type(2 * ROWS as u32);
        let pairs =
            |i| -> Result<BasicValueEnum<'c>> { Ok(self.builder.build_bit_cast(self.arg(stmt, i)?, halves, "pairs")?) };
        let args = [self.arg(stmt, 0)?.into(), pairs(1)?.into(), pairs(2)?.into()];
        self.call_intrinsic(NAME, &args)?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(NAME))
    }

    /// In parts of up to 256 bits, as the vectors of CPUs that it is used for have no more.
    pub(super) fn short_dot(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let [sum, a, b] = [self.arg(stmt, 0)?, self.arg(stmt, 1)?, self.arg(stmt, 2)?];
        let BasicValueEnum::VectorValue(sum) = sum else { return Err(kind(stmt, sum, "a vector of words")) };
        let lanes = u64::from(sum.get_type().get_size());
        let (name, part) = if lanes < 8 { ("llvm.x86.sse2.pmadd.wd", 4) } else { ("llvm.x86.avx2.pmadd.wd", 8) };
        let i32 = self.context.i32_type();
        let pick = |a: VectorValue<'c>, b: VectorValue<'c>, lanes: std::ops::Range<u64>| {
            let mask: Vec<_> = lanes.map(|lane| i32.const_int(lane, false)).collect();
            self.builder.build_shuffle_vector(a, b, VectorType::const_vector(&mask), "part")
        };
        let mut products: Option<VectorValue<'c>> = None;
        for first in (0..lanes).step_by(part as usize) {
            let mut args = Vec::new();
            for words in [a, b] {
                let words = words.into_vector_value();
                let words = pick(words, words.get_type().get_poison(), first..first + part)?;
                let halves = self.context.i16_type().vec_type(2 * part as u32);
                args.push(self.builder.build_bit_cast(words, halves, "halves")?.into());
            }
            let value = self.call_intrinsic(name, &args)?.try_as_basic_value().basic();
            let value = value.ok_or(EmitError::Intrinsic(name))?.into_vector_value();
            products = Some(match products {
                None => value,
                // what there is, and the part made as long
                Some(before) => {
                    let value = pick(value, value.get_type().get_poison(), 0..first)?;
                    pick(before, value, 0..first + part)?
                }
            });
        }
        let products = products.ok_or_else(|| count(stmt, "lanes", 0, 1))?;
        Ok(self.builder.build_int_add(sum, products, "sum")?.into())
    }

    /// Halves of lines change places, then quarters, and so on: each exchange is two shuffles of two lines.
    pub(super) fn tile_turn(&self, stmt: &Stmt) -> Result<()> {
        let [to, from] = [self.pointer(stmt, 0)?, self.pointer(stmt, 1)?];
        let (i32, i64) = (self.context.i32_type(), self.context.i64_type());
        let line = i32.vec_type(ROWS as u32);
        let place = |p, i: u64| self.element(line.into(), p, i64.const_int(i, false));
        let mut lines = Vec::new();
        for i in 0..ROWS {
            let loaded = self.builder.build_load(line, place(from, i)?, "line")?.into_vector_value();
            let access = loaded.as_instruction().expect("a load is an instruction");
            access.set_alignment(4).expect("a power of two");
            lines.push(loaded);
        }
        for apart in [8, 4, 2, 1] {
            for i in (0..ROWS).filter(|i| i & apart == 0) {
                let [low, high] = [i, i + apart].map(|i| lines[i as usize]);
                let pick = |upper: u64| {
                    let lane = |l: u64| if l & apart == 0 { l + upper } else { l - apart + upper + ROWS };
                    let mask: Vec<_> = (0..ROWS).map(|l| i32.const_int(lane(l), false)).collect();
                    self.builder.build_shuffle_vector(low, high, VectorType::const_vector(&mask), "turned")
                };
                (lines[i as usize], lines[(i + apart) as usize]) = (pick(0)?, pick(apart)?);
            }
        }
        for (i, value) in (0..).zip(lines) {
            self.builder.build_store(place(to, i)?, value)?.set_alignment(4).expect("a power of two");
        }
        Ok(())
    }

    pub(super) fn tile_zero(&self) -> Result<()> {
        (0..A).try_for_each(|sum| self.call_intrinsic("llvm.x86.tilezero", &[self.register(sum)]).map(drop))
    }

    pub(super) fn tile_step(&self, stmt: &Stmt, (rows, columns): (usize, usize), once: bool) -> Result<()> {
        if stmt.args.len() != rows + columns {
            return Err(count(stmt, "operands", stmt.args.len(), rows + columns));
        }
        for i in 0..rows + columns {
            let register = if i < rows { A + i } else { B + i - rows };
            let load = if once && i < rows { "llvm.x86.tileloaddt164" } else { "llvm.x86.tileloadd64" };
            self.move_tile(load, register, self.pointer(stmt, i)?, LINE_BYTES)?;
        }
        for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
            let registers = [i * columns + j, A + i, B + j].map(|r| self.register(r));
            self.call_intrinsic("llvm.x86.tdpbf16ps", &registers)?;
        }
        Ok(())
    }

    /// Moves sums from or to a matrix in memory.
    pub(super) fn move_sums(&self, name: &'static str, stmt: &Stmt, (rows, columns): (usize, usize)) -> Result<()> {
        let (c, i64, stride) = (self.pointer(stmt, 0)?, self.context.i64_type(), columns as u64 * LINE_BYTES);
        for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
            let at = i64.const_int(i as u64 * ROWS * stride + j as u64 * LINE_BYTES, false);
            let tile = self.element(self.context.i8_type().into(), c, at)?;
            self.move_tile(name, i * columns + j, tile, stride)?;
        }
        Ok(())
    }

    /// Asks for lines to be brought into the second cache.
    pub(super) fn prefetch_lines(&mut self, stmt: &Stmt) -> Result<()> {
        let (i64, i32, byte) = (self.context.i64_type(), self.context.i32_type(), self.context.i8_type());
        // to be read, used again but not soon, data
        let [read, soon, data] = [0, 2, 1].map(|n| i32.const_int(n, false).into());
        let (at, bytes) = (self.int(stmt, 1)?, self.int(stmt, 2)?);
        let first = self.element(byte.into(), self.pointer(stmt, 0)?, at)?;
        self.counted_loop((i64.const_zero(), bytes, i64.const_int(LINE_BYTES, false)), &[], |this, i, _| {
            let place = this.element(byte.into(), first, i)?;
            this.call_overloaded("llvm.prefetch", &[place.get_type().into()], &[place.into(), read, soon, data])?;
            Ok(Vec::new())
        })?;
        Ok(())
    }

    fn register(&self, number: usize) -> BasicMetadataValueEnum<'c> {
        self.context.i8_type().const_int(number as u64, false).into()
    }

    fn move_tile(&self, name: &'static str, register: usize, place: PointerValue<'c>, stride: u64) -> Result<()> {
        let stride = self.context.i64_type().const_int(stride, false);
        self.call_intrinsic(name, &[self.register(register), place.into(), stride.into()]).map(drop)
    }
}

/// Palette 1, and 16 lines of 64 bytes for each of the eight registers.
fn configuration() -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    for register in 0..8 {
        bytes[16 + 2 * register] = LINE_BYTES as u8;
        bytes[48 + register] = ROWS as u8;
    }
    bytes
}
