"""What people see: tables now, figures later."""
