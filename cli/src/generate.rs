//! `pinfold completions` and `pinfold man`: generated from the command line itself.

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::{Cli, Completions, Man};
use crate::failure::Failure;
use crate::terminal;

/// Prints the script.
pub(crate) fn completions(args: &Completions) -> Result<(), Failure> {
    terminal::print(&script(args.shell))
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pinfold", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Prints the page of the whole command, or writes all pages.
pub(crate) fn man(args: &Man) -> Result<(), Failure> {
    match &args.dir {
        Some(folder) => {
            let failed = |error| {
                Failure::local(format!("cannot write manual pages to {}", folder.display()), error)
            };
            write_pages(folder).map_err(failed)
        }
        None => {
            let mut page = Vec::new();
            let rendered = clap_mangen::Man::new(Cli::command()).render(&mut page);
            rendered.map_err(|error| Failure::local("cannot write the manual page", error))?;
            terminal::print(&String::from_utf8_lossy(&page))
        }
    }
}

fn write_pages(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Cli::command(), folder)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_completes_every_command() {
        for shell in Shell::value_variants() {
            let script = script(*shell);
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }

    #[test]
    fn every_command_has_its_page() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("man1");
        write_pages(&inner).unwrap();
        let page = |name: &str| fs::read_to_string(inner.join(name)).unwrap();
        assert!(page("pinfold.1").contains("Exit codes"), "{}", page("pinfold.1"));
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let text = page(&format!("pinfold-{name}.1"));
            assert!(text.contains(&format!("pinfold {name}")), "{name}: {text}");
        }
    }
}
