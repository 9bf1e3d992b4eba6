"""What arguments may be: rules in annotations, their check at the call, and arrays of any kind made tensors."""
