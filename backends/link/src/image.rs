//! Relocatable objects to one position-independent code image.
//!
//! Code comes first, read-only constants after it. Every reference is relative to the program counter and resolved here,
//! so the runtime maps the image as it lies in the file, readable and executable, and never writes to it.

use std::collections::{BTreeMap, HashMap};

use nextc_abi::Span;
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, RelocationKind, RelocationTarget, SectionFlags, SectionIndex, elf};

use crate::error::LinkError;

type File<'a> = ElfFile64<'a, object::Endianness>;

/// Code and constants, with the offset of every global symbol.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Offsets of the defined global symbols.
    pub symbols: BTreeMap<String, u64>,
    /// For a GPU: the binary of each kernel.
    pub binaries: Vec<Span>,
}

/// Lays out the sections of `objects` and resolves what they refer to.
/// # Errors
/// [`LinkError`] names the object and what in it cannot be part of an image.
pub fn build(objects: &[Vec<u8>]) -> Result<Image, LinkError> {
    let files = objects.iter().enumerate().map(|(index, bytes)| parse(index, bytes)).collect::<Result<Vec<_>, _>>()?;
    let mut image = Image::default();
    let places = lay_out(&files, &mut image)?;
    define_symbols(&files, &places, &mut image)?;
    for (index, file) in files.iter().enumerate() {
        Linker { index, file, places: &places }.resolve(&mut image)?;
    }
    Ok(image)
}

/// Alignment of a binary for a GPU: that of the largest numbers of an ELF file, and more than any section of it asks for.
const BINARY_ALIGN: usize = 128;

/// Lays out one text of PTX a kernel, each ended by a NUL, and the binaries that were made of them, if they were; the symbols of kernel `i` and of
/// its tail lead to text `i`.
pub fn of_ptx(texts: &[Vec<u8>], binaries: &[Vec<u8>]) -> Image {
    let mut image = Image::default();
    for (index, text) in texts.iter().enumerate() {
        for prefix in ["kernel", "tail"] {
            image.symbols.insert(format!("nextc_{prefix}_{index}"), image.bytes.len() as u64);
        }
        image.bytes.extend_from_slice(text);
        image.bytes.push(0);
    }
    for binary in binaries {
        image.bytes.resize(image.bytes.len().next_multiple_of(BINARY_ALIGN), 0);
        image.binaries.push(Span { at: image.bytes.len() as u64, bytes: binary.len() as u64 });
        image.bytes.extend_from_slice(binary);
    }
    image
}

/// Puts images one after the other, each at a page; gives all bytes, and the images with their symbols moved.
pub fn join(mut images: Vec<Image>) -> (Vec<u8>, Vec<Image>) {
    let mut bytes = Vec::new();
    for image in &mut images {
        bytes.resize(bytes.len().next_multiple_of(nextc_abi::PAGE_BYTES as usize), 0);
        let places = image.symbols.values_mut().chain(image.binaries.iter_mut().map(|binary| &mut binary.at));
        places.for_each(|at| *at += bytes.len() as u64);
        bytes.append(&mut image.bytes);
    }
    (bytes, images)
}

fn parse(index: usize, bytes: &[u8]) -> Result<File<'_>, LinkError> {
    File::parse(bytes).map_err(|e| LinkError::Object { index, reason: e.to_string() })
}

/// Where each section of each object lies in the image.
type Places = HashMap<(usize, SectionIndex), u64>;

/// True for what the image holds: everything that is loaded, but for unwinding tables and notes.
fn is_loaded<'d>(section: &impl ObjectSection<'d>) -> bool {
    let name = section.name().unwrap_or_default();
    let loaded = elf_flags(section) & elf::SHF_ALLOC.0 != 0;
    loaded && section.size() > 0 && !name.starts_with(".eh_frame") && !name.starts_with(".note")
}

fn elf_flags<'d>(section: &impl ObjectSection<'d>) -> u64 {
    match section.flags() {
        SectionFlags::Elf { sh_flags, .. } => sh_flags.0,
        _ => 0,
    }
}

fn lay_out(files: &[File<'_>], image: &mut Image) -> Result<Places, LinkError> {
    let mut places = Places::new();
    for executable in [true, false] {
        for (index, file) in files.iter().enumerate() {
            for section in file.sections().filter(is_loaded) {
                if (elf_flags(&section) & elf::SHF_EXECINSTR.0 != 0) == executable {
                    places.insert((index, section.index()), place(index, &section, image)?);
                }
            }
        }
    }
    Ok(places)
}

/// Appends a section to the image and gives its offset.
fn place<'d>(index: usize, section: &impl ObjectSection<'d>, image: &mut Image) -> Result<u64, LinkError> {
    if elf_flags(section) & elf::SHF_WRITE.0 != 0 {
        let section = section.name().unwrap_or("?").to_owned();
        return Err(LinkError::Writable { index, section });
    }
    let data = section.data().map_err(|e| LinkError::Object { index, reason: e.to_string() })?;
    let at = (image.bytes.len() as u64).next_multiple_of(section.align().max(64));
    image.bytes.resize(at as usize, 0);
    image.bytes.extend_from_slice(data);
    Ok(at)
}

fn define_symbols(files: &[File<'_>], places: &Places, image: &mut Image) -> Result<(), LinkError> {
    for (index, file) in files.iter().enumerate() {
        for symbol in file.symbols().filter(|s| s.is_global() && s.is_definition()) {
            let name = symbol.name().unwrap_or_default().to_owned();
            let Some(section) = symbol.section_index().and_then(|s| places.get(&(index, s))) else { continue };
            if image.symbols.insert(name.clone(), section + symbol.address()).is_some() {
                return Err(LinkError::Duplicate { index, symbol: name });
            }
        }
    }
    Ok(())
}

/// Resolves the relocations of one object.
struct Linker<'a> {
    index: usize,
    file: &'a File<'a>,
    places: &'a Places,
}

impl Linker<'_> {
    fn resolve(&self, image: &mut Image) -> Result<(), LinkError> {
        for section in self.file.sections() {
            let Some(&at) = self.places.get(&(self.index, section.index())) else { continue };
            for (offset, relocation) in section.relocations() {
                let name = section.name().unwrap_or("?");
                self.apply(image, name, at, offset, &relocation)?;
            }
        }
        Ok(())
    }

    fn apply(
        &self,
        image: &mut Image,
        section: &str,
        at: u64,
        offset: u64,
        r: &object::Relocation,
    ) -> Result<(), LinkError> {
        let (symbol, target) = self.target(image, r)?;
        let refuse = |kind: String| LinkError::Relocation {
            index: self.index,
            section: section.to_owned(),
            offset,
            kind,
            symbol: symbol.clone(),
        };
        if !matches!(r.kind(), RelocationKind::Relative | RelocationKind::PltRelative) {
            return Err(refuse(format!("{:?} ({:?})", r.kind(), r.flags())));
        }
        let place = at + offset;
        let value = (target as i64).wrapping_add(r.addend()).wrapping_sub(place as i64);
        let bytes = value.to_le_bytes();
        let width = usize::from(r.size() / 8);
        let fits = width == 8 || (width == 4 && i32::try_from(value).is_ok());
        let slot = image.bytes.get_mut(place as usize..place as usize + width);
        match slot {
            Some(slot) if fits => slot.copy_from_slice(&bytes[..width]),
            _ => return Err(refuse(format!("{}-bit out of range", r.size()))),
        }
        Ok(())
    }

    /// Name and offset of what a relocation refers to.
    fn target(&self, image: &Image, r: &object::Relocation) -> Result<(String, u64), LinkError> {
        let undefined = |symbol: &str| LinkError::Undefined { index: self.index, symbol: symbol.to_owned() };
        match r.target() {
            RelocationTarget::Symbol(id) => {
                let symbol = self.file.symbol_by_index(id).map_err(|_| undefined("?"))?;
                let name = self.symbol_name(&symbol);
                let local = symbol.section_index().and_then(|s| self.places.get(&(self.index, s)));
                let offset = local.map(|s| s + symbol.address()).or_else(|| image.symbols.get(&name).copied());
                offset.map(|o| (name.clone(), o)).ok_or_else(|| undefined(&name))
            }
            RelocationTarget::Section(id) => {
                let offset = self.places.get(&(self.index, id)).copied();
                offset.map(|o| ("section".to_owned(), o)).ok_or_else(|| undefined("section"))
            }
            _ => Err(undefined("absolute address")),
        }
    }

    /// A symbol's name, or that of its section if it stands for one.
    fn symbol_name<'d>(&self, symbol: &impl ObjectSymbol<'d>) -> String {
        let name = symbol.name().unwrap_or_default();
        if !name.is_empty() {
            return name.to_owned();
        }
        let section = symbol.section_index().and_then(|s| self.file.section_by_index(s).ok());
        section.and_then(|s| s.name().ok().map(str::to_owned)).unwrap_or_else(|| "?".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use object::write::{Object as Out, Relocation, StandardSection, Symbol, SymbolSection};
    use object::{
        Architecture, BinaryFormat, Endianness, RelocationEncoding, RelocationFlags, SymbolFlags, SymbolKind,
        SymbolScope,
    };

    use super::*;

    struct Unit(Out<'static>);

    impl Unit {
        fn new() -> Self {
            Self(Out::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little))
        }

        fn add(&mut self, section: StandardSection, name: &str, data: &[u8]) -> (object::write::SectionId, u64) {
            let id = self.0.section_id(section);
            let at = self.0.append_section_data(id, data, 16);
            self.0.add_symbol(symbol(name, SymbolSection::Section(id), at));
            (id, at)
        }

        fn refer(
            &mut self,
            section: object::write::SectionId,
            offset: u64,
            name: &str,
            kind: RelocationKind,
            size: u8,
        ) {
            let id = self
                .0
                .symbol_id(name.as_bytes())
                .unwrap_or_else(|| self.0.add_symbol(symbol(name, SymbolSection::Undefined, 0)));
            let flags = RelocationFlags::Generic { kind, encoding: RelocationEncoding::Generic, size };
            self.0.add_relocation(section, Relocation { offset, symbol: id, addend: -4, flags }).unwrap();
        }

        fn bytes(&self) -> Vec<u8> {
            self.0.write().unwrap()
        }
    }

    fn symbol(name: &str, section: SymbolSection, value: u64) -> Symbol {
        let flags = SymbolFlags::None;
        let name = name.as_bytes().to_vec();
        Symbol {
            name,
            value,
            size: 4,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section,
            flags,
        }
    }

    #[test]
    fn references_between_objects_and_sections_are_resolved() {
        let mut a = Unit::new();
        let (text, at) = a.add(StandardSection::Text, "a", &[0x90; 8]);
        a.refer(text, at + 4, "b", RelocationKind::PltRelative, 32);
        let mut b = Unit::new();
        let (text, at) = b.add(StandardSection::Text, "b", &[0x91; 8]);
        b.add(StandardSection::ReadOnlyData, "table", &[7; 16]);
        b.refer(text, at + 4, "table", RelocationKind::Relative, 32);
        let image = build(&[a.bytes(), b.bytes()]).unwrap();
        let read =
            |at: u64| i64::from(i32::from_le_bytes(image.bytes[at as usize..at as usize + 4].try_into().unwrap()));
        let of = |name: &str| image.symbols[name];
        assert_eq!(read(of("a") + 4), of("b") as i64 - 4 - (of("a") as i64 + 4));
        assert_eq!(read(of("b") + 4), of("table") as i64 - 4 - (of("b") as i64 + 4));
        assert!(of("table") > of("b"));
        assert_eq!(image.bytes[of("table") as usize..][..16], [7; 16]);
    }

    #[test]
    fn what_has_no_place_in_an_image_is_named() {
        let mut unit = Unit::new();
        let (text, at) = unit.add(StandardSection::Text, "a", &[0; 16]);
        unit.refer(text, at, "memcpy", RelocationKind::PltRelative, 32);
        assert!(matches!(build(&[unit.bytes()]), Err(LinkError::Undefined { symbol, .. }) if symbol == "memcpy"));

        let mut unit = Unit::new();
        let (text, at) = unit.add(StandardSection::Text, "a", &[0; 16]);
        unit.refer(text, at, "a", RelocationKind::Absolute, 64);
        assert!(matches!(build(&[unit.bytes()]), Err(LinkError::Relocation { symbol, .. }) if symbol == "a"));

        let mut unit = Unit::new();
        unit.add(StandardSection::Data, "state", &[0; 16]);
        assert!(matches!(build(&[unit.bytes()]), Err(LinkError::Writable { .. })));

        let mut unit = Unit::new();
        unit.add(StandardSection::Text, "a", &[0; 16]);
        assert!(
            matches!(build(&[unit.bytes(), unit.bytes()]), Err(LinkError::Duplicate { symbol, .. }) if symbol == "a")
        );
        assert!(matches!(build(&[b"no object".to_vec()]), Err(LinkError::Object { index: 0, .. })));
    }
}
