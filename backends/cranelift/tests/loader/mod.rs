//! Compiles kernels, loads the object and calls it, as the runtime does.

use nextc_ir::graph::ModelInfo;
use nextc_ir::kernel::Kernel;
use nextc_ir::schedule::{ArenaPlan, KernelModule};
use nextc_ir::target::Target;
use object::{Object, ObjectSection, ObjectSymbol};

type Function = unsafe extern "C" fn(*const u64, *mut u8, i64, i64);

/// A target that this backend is for.
pub fn target() -> Target {
    Target::cpu("x86-64-v3", &["avx2", "fma", "bmi", "bmi2", "popcnt", "lzcnt"], 128)
}

/// A module of nothing but kernels.
pub fn module(kernels: Vec<Kernel>) -> KernelModule {
    KernelModule {
        info: ModelInfo::default(),
        kernels,
        programs: Vec::new(),
        weights: Vec::new(),
        states: Vec::new(),
        arena: ArenaPlan::default(),
        page_tokens: 64,
    }
}

/// Code in executable memory.
pub struct Loaded {
    code: memmap2::Mmap,
    symbols: Vec<(String, usize)>,
}

impl Loaded {
    /// Compiles a module and loads its object, which must refer to nothing.
    pub fn new(module: &KernelModule) -> Self {
        let bytes = nextc_cranelift::compile(module, &target()).expect("the module compiles");
        let file = object::File::parse(&*bytes).expect("the object is an object");
        assert!(file.symbols().all(|s| !s.is_undefined() || s.name() == Ok("")), "the object needs a symbol");
        assert!(file.sections().all(|s| s.relocations().next().is_none()), "the object has relocations");
        let text = file.section_by_name(".text").expect("there is code");
        let data = text.data().expect("code has bytes");
        let mut code = memmap2::MmapMut::map_anon(data.len()).expect("memory for the code");
        code.copy_from_slice(data);
        let symbols = file
            .symbols()
            .filter(|s| s.is_global())
            .map(|s| (s.name().expect("symbols have names").to_owned(), s.address() as usize))
            .collect();
        Self { code: code.make_exec().expect("executable memory"), symbols }
    }

    /// Names of the functions.
    #[allow(dead_code, reason = "not every test asks")]
    pub fn symbols(&self) -> Vec<&str> {
        self.symbols.iter().map(|s| s.0.as_str()).collect()
    }

    /// Calls a function on buffers of the caller, as a team of one thread.
    pub fn call(&self, symbol: &str, dims: [u64; 4], buffers: &mut [&mut [u32]], tasks: (i64, i64)) {
        let at = self.symbols.iter().find(|s| s.0 == symbol).expect("the symbol exists").1;
        let args: Vec<u64> =
            dims.into_iter().chain([1]).chain(buffers.iter_mut().map(|b| b.as_mut_ptr() as u64)).collect();
        let mut scratch = vec![[0xa5_u8; 64]; 65];
        let aligned = scratch.as_mut_ptr().cast::<u8>();
        let aligned = aligned.wrapping_add(aligned.align_offset(64));
        // SAFETY: the code was compiled for this signature, and the tests give buffers that their kernels stay inside of.
        unsafe {
            let function: Function = std::mem::transmute(self.code.as_ptr().add(at));
            function(args.as_ptr(), aligned, tasks.0, tasks.1);
        }
    }
}
