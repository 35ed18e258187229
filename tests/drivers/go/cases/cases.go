// Package cases runs the cases of one driver and prints what became of each.
//
// A case fails by panicking, which [Check], [Must], [Equal] and [Fails] do for it.
package cases

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// One case may take this long, on a machine with other work.
const timeout = 30 * time.Second

// A longer value is printed as its digest.
const maxValueBytes = 2000

type test struct {
	name string
	run  func(context.Context) any
}

var tests []test

// Test adds a case. What run returns is compared with what it returns without the
// proxy, so it holds no process ids, OIDs or times.
func Test(name string, run func(context.Context) any) {
	tests = append(tests, test{name, run})
}

type report struct {
	Case  string `json:"case"`
	OK    bool   `json:"ok"`
	Error string `json:"error"`
	Value string `json:"value"`
}

// URL is the way to the database that is under test.
func URL() string { return os.Getenv("DRIVER_URL") }

// DirectURL is the way to the same database without the proxy.
func DirectURL() string { return os.Getenv("DRIVER_DIRECT_URL") }

// Run runs all cases in turn, and prints a line of JSON for each.
func Run() {
	out := json.NewEncoder(os.Stdout)
	for _, each := range tests {
		done := make(chan report, 1)
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		go func() { done <- run(ctx, each) }()
		select {
		case result := <-done:
			Check(out.Encode(result))
		// A case that does not heed its context is left behind.
		case <-time.After(timeout + time.Second):
			Check(out.Encode(report{Case: each.name, Error: "timed out"}))
		}
		cancel()
	}
}

func run(ctx context.Context, each test) (result report) {
	result.Case = each.name
	defer func() {
		if failure := recover(); failure != nil {
			result.OK = false
			result.Error = fmt.Sprintf("%s: %v", origin(), failure)
		}
	}()
	value := Must(json.Marshal(each.run(ctx)))
	if len(value) > maxValueBytes {
		value = fmt.Appendf(nil, "%d bytes, %x", len(value), sha256.Sum256(value))
	}
	result.Value = string(value)
	result.OK = true
	return result
}

// origin names the lines of the driver's program that a panic passed through.
func origin() string {
	callers := make([]uintptr, 32)
	frames := runtime.CallersFrames(callers[:runtime.Callers(0, callers)])
	var lines []string
	for more := true; more; {
		var frame runtime.Frame
		frame, more = frames.Next()
		if strings.HasPrefix(frame.Function, "main.") {
			lines = append(lines, fmt.Sprintf("%s:%d", filepath.Base(frame.File), frame.Line))
		}
	}
	return strings.Join(lines, " < ")
}

// InParallel calls work with each number below count, from so many goroutines. It
// fails the case with the first failure.
func InParallel(goroutines, count int, work func(number int)) {
	var every sync.WaitGroup
	var next atomic.Int64
	failures := make(chan any, goroutines)
	for range goroutines {
		every.Go(func() {
			defer func() {
				if failure := recover(); failure != nil {
					failures <- fmt.Sprintf("%s: %v", origin(), failure)
				}
			}()
			for number := int(next.Add(1)); number <= count; number = int(next.Add(1)) {
				work(number - 1)
			}
		})
	}
	every.Wait()
	if len(failures) > 0 {
		panic(<-failures)
	}
}

// Check fails the case if err is one.
func Check(err error) {
	if err != nil {
		panic(err)
	}
}

// Must returns value, or fails the case if err is an error.
func Must[T any](value T, err error) T {
	Check(err)
	return value
}

// Equal fails the case unless got is want, deeply.
func Equal(got, want any) {
	if !reflect.DeepEqual(got, want) {
		panic(fmt.Sprintf("got %s, want %s", show(got), show(want)))
	}
}

// Fails returns the SQLSTATE of err by state, or fails the case if there is none.
func Fails(err error, state func(error) string) string {
	if err == nil {
		panic("no error")
	}
	code := state(err)
	if code == "" {
		panic(fmt.Sprintf("not an error of Postgres: %v", err))
	}
	return code
}

func show(value any) string {
	text := fmt.Sprintf("%#v", value)
	if len(text) > 200 {
		return fmt.Sprintf("%s… (%d characters)", text[:200], len(text))
	}
	return text
}
