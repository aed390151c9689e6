"""What answers requests: bundle -> session -> scheduler -> HTTP, each in a file of its own."""
