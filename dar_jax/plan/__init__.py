"""What an experiment would take on TPUs: compiled for them ahead of time, on a machine that has none."""

# What libtpu needs to know where there is no TPU; set before JAX is imported.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of the host, which is asked for but not used
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # as there is no TPU that two processes could fight for
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "1",  # warnings, of which some are worth a note
}
