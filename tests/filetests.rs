//! The specification in files: `tests/filetests/FOLDER/*` hold IR text, and what must become of it.
//!
//! The first line of a file is `; test KIND`; `support/filetest` says which kinds there are and what is compared.
//! `BLESS=1 cargo test --test filetests` rewrites expectations, `FILETEST=word` runs only the files whose path has the word.

#[path = "support/filetest/mod.rs"]
mod filetest;

/// One test a folder; a test of that says so if a folder has none.
macro_rules! folders {
    ($($folder:ident),+ $(,)?) => {
        $(#[test]
        fn $folder() {
            filetest::check_folder(stringify!($folder));
        })+

        #[test]
        fn every_folder_has_a_test() {
            filetest::check_folders(&[$(stringify!($folder)),+]);
        }
    };
}

folders!(text, verify, specialise, join, rewrite, layout, partition, memory, lower, emit, run, kernel, config);

#[test]
fn every_op_is_run() {
    filetest::check_ops_are_run();
}

#[test]
fn every_rule_fires() {
    filetest::check_rules_fire();
}
