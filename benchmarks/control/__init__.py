"""What gRPC and the sidecar add to a direct POST, against what ``gather_object`` adds; on the CPU, without SGLang."""
