//! Compiles the contract with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const CONTRACT: &str = "pinfold/v1/pinfold.proto";
    println!("cargo:rerun-if-changed={CONTRACT}");
    let descriptors = protox::compile([CONTRACT], ["."])?;
    // What came from the network is written to the file as it is, without a copy in between.
    let generator = tonic_prost_build::configure().bytes(".pinfold.v1.WriteRequest.data");
    generator.compile_fds(descriptors)?;
    Ok(())
}
