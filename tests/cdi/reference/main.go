// Debian's CDI library for one case: a JSON request on stdin, the answer on stdout.
// A case that crashes the library ends the program.
package main

import (
	"encoding/json"
	"os"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

type request struct {
	Dirs     []string  `json:"dirs"`
	Devices  []string  `json:"devices"`
	Config   *oci.Spec `json:"config"`
	Expected *oci.Spec `json:"expected"`
}

type answer struct {
	// What is wrong with each file, conflicts included.
	Errors     map[string][]string `json:"errors"`
	Unresolved []string            `json:"unresolved"`
	// Empty if the devices are in the config.
	Failure string    `json:"failure"`
	Config  *oci.Spec `json:"config"`
	// That of the request, as this library writes it.
	Expected *oci.Spec `json:"expected"`
}

func main() {
	r := request{}
	check(json.NewDecoder(os.Stdin).Decode(&r))
	cache, err := cdi.NewCache(cdi.WithSpecDirs(r.Dirs...), cdi.WithAutoRefresh(false))
	check(err)
	a := answer{Errors: map[string][]string{}, Unresolved: []string{}, Config: r.Config, Expected: r.Expected}
	for path, errors := range cache.GetErrors() {
		for _, e := range errors {
			a.Errors[path] = append(a.Errors[path], e.Error())
		}
	}
	if len(r.Devices) > 0 {
		unresolved, err := cache.InjectDevices(r.Config, r.Devices...)
		a.Unresolved = append(a.Unresolved, unresolved...)
		if err != nil {
			a.Failure = err.Error()
		}
	}
	check(json.NewEncoder(os.Stdout).Encode(a))
}

func check(err error) {
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
}
