//! Structured control as blocks: loops test at their end, and values flow through block parameters.

use cranelift::codegen::ir::{Block, BlockArg};
use cranelift::prelude::types::I64;
use cranelift::prelude::{InstBuilder, IntCC, Value};
use nextc_ir::kernel::{Region, Stmt, Val};

use crate::Error;
use crate::function::Emitter;

/// Values as arguments of a block.
fn block_args(values: &[Value]) -> Vec<BlockArg> {
    values.iter().map(|&v| v.into()).collect()
}

impl Emitter<'_, '_> {
    /// Every statement of a region, in order.
    pub fn stmts(&mut self, region: &Region) -> Result<(), Error> {
        region.stmts.iter().try_for_each(|stmt| self.stmt(stmt))
    }

    /// A loop: a guard, then the body, which branches back to itself while there is a next step.
    pub fn for_loop(&mut self, stmt: &Stmt) -> Result<(), Error> {
        self.expect(stmt, "regions", stmt.regions.len(), 1)?;
        let region = &stmt.regions[0];
        let args = self.all_values(&stmt.args)?;
        let [lo, hi, step, init @ ..] = args.as_slice() else {
            return self.expect(stmt, "operands", args.len(), 3 + stmt.results.len());
        };
        self.expect(stmt, "carried values", init.len(), stmt.results.len())?;
        self.expect(stmt, "yields", region.yields.len(), stmt.results.len())?;
        self.expect(stmt, "region parameters", region.params.len(), 1 + stmt.results.len())?;

        let (body, exit) = (self.fb.create_block(), self.fb.create_block());
        let counter = self.fb.append_block_param(body, I64);
        let carried = self.block_params(body, init);
        let results = self.block_params(exit, init);
        let first = block_args(&[&[*lo], init].concat());
        let (lo_known, hi_known) = (self.known(stmt.args[0])?.constant, self.known(stmt.args[1])?.constant);
        if lo_known.zip(hi_known).is_some_and(|(lo, hi)| lo < hi) {
            self.fb.ins().jump(body, &first);
        } else {
            let any = self.fb.ins().icmp(IntCC::SignedLessThan, *lo, *hi);
            self.fb.ins().brif(any, body, &first, exit, &block_args(init));
        }

        self.fb.switch_to_block(body);
        self.depth += 1;
        self.define(region.params[0], counter);
        self.define_all(&region.params[1..], &carried);
        self.stmts(region)?;
        let yields = self.all_values(&region.yields)?;
        let next = self.fb.ins().iadd(counter, *step);
        let more = self.fb.ins().icmp(IntCC::SignedLessThan, next, *hi);
        let again = block_args(&[&[next], yields.as_slice()].concat());
        self.fb.ins().brif(more, body, &again, exit, &block_args(&yields));

        self.depth -= 1;
        self.fb.switch_to_block(exit);
        self.define_all(&stmt.results, &results);
        Ok(())
    }

    /// A condition: two blocks that meet in a third.
    pub fn if_else(&mut self, stmt: &Stmt) -> Result<(), Error> {
        self.expect(stmt, "operands", stmt.args.len(), 1)?;
        self.expect(stmt, "regions", stmt.regions.len(), 2)?;
        let condition = self.value(stmt.args[0])?;
        let blocks = [self.fb.create_block(), self.fb.create_block()];
        let join = self.fb.create_block();
        self.fb.ins().brif(condition, blocks[0], &[], blocks[1], &[]);
        let mut results = None;
        for (region, block) in stmt.regions.iter().zip(blocks) {
            self.expect(stmt, "yields", region.yields.len(), stmt.results.len())?;
            self.fb.switch_to_block(block);
            self.stmts(region)?;
            let yields = self.all_values(&region.yields)?;
            results.get_or_insert_with(|| self.block_params(join, &yields));
            self.fb.ins().jump(join, &block_args(&yields));
        }
        self.fb.switch_to_block(join);
        self.define_all(&stmt.results, &results.unwrap_or_default());
        Ok(())
    }

    /// Parameters of a block with the types of `like`.
    fn block_params(&mut self, block: Block, like: &[Value]) -> Vec<Value> {
        let types: Vec<_> = like.iter().map(|&v| self.fb.func.dfg.value_type(v)).collect();
        types.into_iter().map(|ty| self.fb.append_block_param(block, ty)).collect()
    }

    fn define_all(&mut self, vals: &[Val], values: &[Value]) {
        for (&val, &value) in vals.iter().zip(values) {
            self.define(val, value);
        }
    }
}
