//! Puts an object into memory and runs it: sections one after another in one mapping, relocations resolved among them.

use std::collections::HashMap;

use object::{Object, ObjectSection, ObjectSymbol, RelocationKind, RelocationTarget, SectionIndex, SectionKind};

/// Machine code in memory.
pub struct Code {
    base: *mut u8,
    bytes: usize,
    functions: HashMap<String, usize>,
}

type KernelFn = unsafe extern "C" fn(*const u64, *mut u8, i64, i64);

impl Code {
    /// Loads an object.
    pub fn load(object: &[u8]) -> Self {
        let file = object::File::parse(object).expect("the object is well formed");
        let (places, bytes) = place_sections(&file);
        let base = map(bytes);
        for section in file.sections().filter(|s| places.contains_key(&s.index())) {
            let data = section.data().expect("sections have their data");
            // SAFETY: the mapping is as long as all sections together, and each has its own place.
            unsafe { base.add(places[&section.index()]).copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        }
        relocate(&file, &places, base);
        let functions = file.symbols().filter(|s| s.is_definition() && s.is_global()).map(|s| {
            let section = s.section_index().expect("a definition lies in a section");
            (s.name().expect("symbols have names").to_owned(), places[&section] + s.address() as usize)
        });
        let functions = functions.collect();
        // SAFETY: the range is the mapping.
        assert_eq!(unsafe { libc::mprotect(base.cast(), bytes, libc::PROT_READ | libc::PROT_EXEC) }, 0);
        Self { base, bytes, functions }
    }

    /// Calls a function of the kernel ABI, if it is there.
    pub fn call(&self, name: &str, args: &[u64], scratch: &mut [Line], (first, last): (i64, i64)) -> bool {
        let Some(&at) = self.functions.get(name) else { return false };
        // SAFETY: the code was compiled to this signature, and the test gives it the buffers that its kernel expects.
        unsafe {
            let function: KernelFn = std::mem::transmute(self.base.add(at));
            function(args.as_ptr(), scratch.as_mut_ptr().cast(), first, last);
        }
        true
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: nobody holds a pointer into the mapping.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// Scratch memory, in lines of its alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

fn place_sections(file: &object::File<'_>) -> (HashMap<SectionIndex, usize>, usize) {
    let mut places = HashMap::new();
    let mut end = 0usize;
    for section in file.sections() {
        if matches!(section.kind(), SectionKind::Text | SectionKind::ReadOnlyData | SectionKind::ReadOnlyString) {
            let at = end.next_multiple_of(section.align().max(64) as usize);
            places.insert(section.index(), at);
            end = at + section.size() as usize;
        }
    }
    (places, end.next_multiple_of(4096))
}

fn map(bytes: usize) -> *mut u8 {
    // SAFETY: a fresh anonymous mapping.
    let base = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(base, libc::MAP_FAILED);
    base.cast()
}

fn relocate(file: &object::File<'_>, places: &HashMap<SectionIndex, usize>, base: *mut u8) {
    for section in file.sections().filter(|s| places.contains_key(&s.index())) {
        for (at, relocation) in section.relocations() {
            let RelocationTarget::Symbol(symbol) = relocation.target() else { panic!("{relocation:?}") };
            let symbol = file.symbol_by_index(symbol).expect("relocations name symbols");
            let home = symbol.section_index().expect("objects refer to nobody else");
            let to = places[&home] as i64 + symbol.address() as i64 + relocation.addend();
            let from = places[&section.index()] as i64 + at as i64;
            assert_eq!((relocation.kind(), relocation.size()), (RelocationKind::Relative, 32), "{relocation:?}");
            let field = i32::try_from(to - from).expect("objects are small").to_le_bytes();
            // SAFETY: the field lies in a section that has been copied to its place.
            unsafe { base.add(from as usize).copy_from_nonoverlapping(field.as_ptr(), field.len()) };
        }
    }
}
